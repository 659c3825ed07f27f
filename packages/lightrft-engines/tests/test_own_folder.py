"""Temporary directories of engines go, also those of processes that were killed, and no others."""

import os
import subprocess
import sys
from pathlib import Path

from lightrft.engines.own_folder import OwnFolder


def test_it_goes_with_its_object_and_stays_when_a_fork_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = OwnFolder("sample")
    child = os.fork()
    if child == 0:
        folder.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert [it.name for it in tmp_path.iterdir()] == [Path(folder.path).name]
    del folder
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_and_what_is_in_use_stays(tmp_path, monkeypatch):
    script = (
        "from lightrft.engines.own_folder import OwnFolder; f = OwnFolder('sample'); print(f.path, flush=True); input()"
    )
    started = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "TMPDIR": str(tmp_path)},
    }
    with (
        subprocess.Popen([sys.executable, "-P", "-c", script], **started) as killed,
        subprocess.Popen([sys.executable, "-P", "-c", script], **started) as living,
    ):
        left, used = (Path(process.stdout.readline().strip()) for process in (killed, living))
        killed.kill()
        killed.wait()
        assert left.exists()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        OwnFolder("other")
        assert left.exists()
        own = OwnFolder("sample")
        assert set(tmp_path.iterdir()) == {used, Path(own.path)}
        living.communicate("\n")
    assert not used.exists()
