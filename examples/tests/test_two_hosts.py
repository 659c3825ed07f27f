"""Two hosts, in two network namespaces, make the same updates as one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "two_hosts/run.py"


def namespaces_can_be_made():
    if shutil.which("ip") is None or os.geteuid():
        return False
    made = subprocess.run(["ip", "netns", "add", "lightrft-probe"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", "lightrft-probe"], capture_output=True, check=False)
    return made


@pytest.mark.skipif(not namespaces_can_be_made(), reason="needs root, iproute2 and network namespaces")
def test_two_hosts_give_the_weights_of_one_process():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "two hosts:" in done.stdout and "one process:" in done.stdout
