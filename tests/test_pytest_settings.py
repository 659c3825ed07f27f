"""The settings of pytest in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

ANOTHER_RUN = """
import os, errno
remove = os.rmdir
def rmdir(path, **options):
    if "garbage-" in str(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")
    remove(path, **options)
os.rmdir = rmdir
"""


def test_runs_at_the_same_time_may_remove_the_same_old_folder(tmp_path: Path) -> None:
    old = tmp_path / "pytest-of-root/garbage-1"
    old.mkdir(parents=True)
    (tmp_path / "another_run.py").write_text(ANOTHER_RUN)
    (tmp_path / "test_one.py").write_text("def test_one(tmp_path): pass\n")
    command = [
        sys.executable, "-m", "pytest", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "another_run", "test_one.py",
    ]  # fmt: skip
    variables = {"PYTEST_DEBUG_TEMPROOT": str(tmp_path), "PYTHONPATH": str(tmp_path), "USER": "root", "LOGNAME": "root"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert "1 passed" in ended.stdout and ended.returncode == 0, ended.stdout + ended.stderr
