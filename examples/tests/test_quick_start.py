"""The notebook runs, and prints what is stored in it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "quick_start.ipynb"
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

notebook = nbformat.read(sys.argv[1], as_version=4)
config = Config({"KernelManager": {"transport": "ipc"}})  # no ports
NotebookClient(notebook, config=config, kernel_name="python3", timeout=300, coalesce_streams=True).execute()
print(nbformat.writes(notebook))
"""


def printed(notebook):
    """What each code cell prints."""
    return [
        "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def test_the_notebook_prints_what_is_stored(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, NOTEBOOK], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    stored = printed(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert "gradient norm" in stored[1]
    assert printed(json.loads(done.stdout)) == stored


def test_the_notebook_holds_nothing_of_the_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert not re.search(r"/(?:home|root|tmp|work|usr|opt|venv)\b", text)
    assert {output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", [])} == {"stream"}
    assert {output["name"] for cell in notebook["cells"] for output in cell.get("outputs", [])} == {"stdout"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
