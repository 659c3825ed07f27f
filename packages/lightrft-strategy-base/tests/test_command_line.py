"""What all commands have in common: versions, usage, how they fail, and what they import."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import lightrft, refused

COMMANDS = {"doctor", "strategies", "engines", "config", "checkpoint", "convert", "adopt"}


def test_help_lists_the_commands_and_imports_neither_torch_nor_pydantic_nor_rich():
    code = (
        "import sys, atexit; from lightrft_cli.main import app\n"
        "atexit.register(lambda: print({'torch', 'numpy', 'pydantic', 'rich', 'yaml'} & set(sys.modules)))\n"
        "app(['--help'], prog_name='lightrft')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_lines, imported = done.stdout.splitlines()
    assert imported == "set()"
    assert {line.split()[0] for line in help_lines if line.startswith("  ") and line.strip()} >= COMMANDS


def test_version_names_all_packages():
    from importlib.metadata import version

    lines = dict(line.split() for line in lightrft("--version").splitlines())
    assert lines["lightrft-config"] == version("lightrft-config")
    assert lines["lightrft-strategy-base"] == version("lightrft-strategy-base")


@pytest.mark.parametrize(
    ("words", "expected"), [("lightrft che", ["checkpoint"]), ("lightrft config ", ["check", "show"])]
)
def test_a_shell_completes_commands(words, expected):
    code = "from lightrft_cli.main import app; app(prog_name='lightrft')"
    asked = {"_LIGHTRFT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked, check=True
    )
    assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize("group", [(), ("config",), ("checkpoint",)])
def test_a_group_without_a_command_prints_its_help(group):
    assert f"Usage: {' '.join(['lightrft', *group])}" in lightrft(*group)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("docter",), "lightrft: No such command 'docter'"),
        (("config", "shw", "x.yaml"), "lightrft config: No such command 'shw'"),
        (("config", "show"), "lightrft config show: Missing argument"),  # typer's older versions print FILE
        (("checkpoint", "list", ".", "--jsn"), "lightrft checkpoint list: No such option: --jsn"),
        (("convert", "a", "b", "--dtype=int7"), "lightrft convert: Invalid value for '--dtype'"),
    ],
)
def test_invalid_usage_is_one_line_that_names_the_help(arguments, said):
    line = refused(*arguments)
    assert line.startswith(said) and line.endswith("--help")


def test_a_reader_that_stops_early_sees_no_error(tmp_path):
    code = "import sys; from lightrft_cli.main import app; app(['config', 'show', '--all', sys.argv[1]])"
    (tmp_path / "run.yaml").write_text("bf16: false\n")
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_command_whose_output_is_closed_does_its_work(tmp_path):
    (tmp_path / "run.yaml").write_text("bf16: false\n")
    code = "from lightrft_cli.main import app; app(['config', 'show', 'run.yaml'])"
    command = f'{shlex.quote(sys.executable)} -c "{code}" >&-'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("bf16: false\n")
    code = "from lightrft_cli.main import app; app(['config', 'show', 'run.yaml'], prog_name='lightrft')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "expected to write its output, got: No space left on device." in line
