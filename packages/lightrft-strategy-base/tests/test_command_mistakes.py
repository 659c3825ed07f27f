"""Wrong names, missing files and broken files: each command says so in one line, with exit code 2, and writes nothing."""

import os
import subprocess
import sys

import pytest
from command_line import refused

MISTAKES = [
    "doctor extra",
    "doctor --nope",
    "strategies fsdp",
    "engines vllm",
    "config shw run.yaml",
    "config show missing.yaml",
    "config show folder",
    "config show broken.json",
    "config show broken.yaml",
    "config show binary.json",
    "config check missing.yaml",
    "config check list.json",
    "config check broken.json",
    "config check broken.yaml",
    "config check binary.json",
    "checkpoint lst run",
    "checkpoint list missing",
    "checkpoint list broken.json",
    "checkpoint show missing",
    "checkpoint show folder",
    "checkpoint show damaged",
    "checkpoint show damaged --tag nope",
    "checkpoint verify missing",
    "checkpoint verify folder",
    "checkpoint verify folder --tag nope",
    "convert folder",
    "convert missing out",
    "convert folder out",
    "convert damaged out",
    "convert broken.json out",
    "convert model out",
    "convert model out --base missing",
    "convert model out --dtype int7",
    "convert model out --max-shard-size huge",
    "adopt",
    "adopt missing",
    "adopt folder",
    "adopt broken.json",
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with what the mistakes name."""
    for folder in ("folder", "damaged/step1", "model"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("broken.json", "damaged/step1/manifest.json", "model/config.json"):
        (tmp_path / name).write_text('{"seed":')
    (tmp_path / "model/model.safetensors").touch()
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(files, command):
    before = sorted(files.rglob("*"))
    assert refused(*command.split()).startswith("lightrft ")
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lightrft che", {"checkpoint"}),
        ("lightrft checkpoint v", {"verify"}),
        ("lightrft convert --al", {"--allow-pickle"}),
    ],
)
def test_the_shell_completes(words, offered):
    variables = {"_LIGHTRFT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-c", "from lightrft_cli.main import app; app(prog_name='lightrft')"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
