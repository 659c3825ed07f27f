"""The launcher of SGLang's servers when it fails. Its ordinary work is tested by the tests of the engine, which it starts."""

import os
import subprocess
import sys
import textwrap

START = textwrap.dedent("""
    from lightrft.config import LightRFTError
    from lightrft.engines.sglang.server_process import ServerProcess
    for _ in range(2):
        try:
            ServerProcess({"device": "cpu", "tp_size": 1}, timeout=120.0)
        except LightRFTError as error:
            print(error)
""")


def test_servers_start_without_a_launcher_that_has_ended(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text("raise ImportError('SGLang is broken here')")
    command = [sys.executable, "-m", "lightrft.engines.sglang.launcher", sys.executable, "-c", START]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("has ended, see its output") == 2
    assert "Traceback" in run.stderr  # why it ended
    assert run.stdout.count("sglang") >= 2  # and why the servers did not start
