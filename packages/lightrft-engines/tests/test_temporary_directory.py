"""Temporary directories of engines are removed, also those of killed processes, and no others."""

import errno
import os
import subprocess
import sys
from pathlib import Path

from lightrft.engines.temporary_directory import TemporaryDirectory


def test_a_temporary_directory_is_removed_with_its_object_and_not_by_a_fork(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = TemporaryDirectory("sample")
    child = os.fork()
    if child == 0:
        directory.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.glob("lightrft-*")] == [Path(directory.path).name]
    del directory
    assert not list(tmp_path.iterdir())


def test_the_next_process_removes_unused_directories_of_killed_processes(tmp_path, monkeypatch):
    script = "from lightrft.engines.temporary_directory import TemporaryDirectory; f = TemporaryDirectory('sample'); print(f.path, flush=True); input()"
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
        TemporaryDirectory("other")
        assert left.exists()
        new = TemporaryDirectory("sample")
        assert set(tmp_path.glob("lightrft-*")) == {used, Path(new.path)}
        living.communicate("\n")
    assert not used.exists()


def test_without_locks_nothing_of_other_processes_is_removed(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    used, new = TemporaryDirectory("sample"), TemporaryDirectory("sample")
    assert set(tmp_path.glob("lightrft-*")) == {Path(used.path), Path(new.path)}
