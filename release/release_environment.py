"""Running commands as a reader of the pages would: in a shell, with an environment's programs on the path."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 900
"""For one command. An install may unpack torch."""


def run(command: str, *, cwd: Path | None = None, venv: Path | None = None, **variables: str) -> str:
    """Run ``command``, which must succeed; returns its output. ``venv``: the environment that is active."""
    pins = str(ROOT / "constraints/cpu.txt")
    environment = {**os.environ, "PIP_CONSTRAINT": pins, "UV_CONSTRAINT": pins, "PIP_NO_COMPILE": "1", **variables}
    if "PIP_FIND_LINKS" in os.environ:
        environment.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))
    else:
        environment.setdefault("UV_TORCH_BACKEND", "cpu")
    environment.pop("VIRTUAL_ENV", None)
    if venv is not None:
        environment |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
