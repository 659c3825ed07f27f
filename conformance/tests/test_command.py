"""The command `lightrft-conformance`."""

import subprocess
import sys


def test_help_imports_neither_torch_nor_the_contract() -> None:
    code = (
        "import sys, atexit; from lightrft.conformance.cli import app\n"
        "atexit.register(lambda: print({'torch', 'hypothesis', 'rich', 'lightrft.conformance.contract'} & set(sys.modules)))\n"
        "app(['--help'], prog_name='lightrft-conformance')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_lines, imported = done.stdout.splitlines()
    assert imported == "set()"
    assert any(line.split()[:1] == ["run-engine"] for line in help_lines)
