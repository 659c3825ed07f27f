"""Pages in Markdown: their code blocks, and running these as a reader would.

What a block is follows from its first line, its language, or a comment right above it:

- ``# NAME`` in the first line: a file of the page. It is written when the page comes to it.
- ``console``, or lines that begin with ``$``: commands, each with what it prints. A line ``...`` of a page stands for any lines.
  A command may fail if the last line shown is its error: one that each process that failed wrote to stderr.
- ``sh``, or no language: commands; each must succeed.
- ``python``: a script. A ``text`` block right below it is what it prints.
- ``text``, ``mermaid``: nothing to run.
- ``<!-- path/of/a/file -->`` above it: an excerpt of a file of this repository, or all of it, which the page then has too; a line
  ``...`` stands for lines left out.
- ``<!-- tested by: path -->`` above it: another test runs it.
- ``<!-- not run: reason -->`` above it: nothing here can run it.

Scripts run in processes that are forked from one that has imported torch, transformers and DeepSpeed, with the environment
that ``torchrun`` gives to each rank: importing them takes longer than all the scripts of a page. Other commands run in a shell.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 500.0
"""For one command; the first one waits for the imports."""
PRELOADED = [
    "torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.generation", "peft", "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon", "lightrft_cli.main", "lightrft.strategy", "lightrft.fsdp", "lightrft.deepspeed", "lightrft.engines",
]  # fmt: skip
FOLDER = "/data/run"
"""What pages call the directory in which their commands run."""
MODULES = {"lightrft": "lightrft_cli"}
"""Commands that are modules."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r"# ([\w-]+\.\w+)\n")
_VARYING = [
    (re.compile(r"^\[\d\d-\d\d \d\d:\d\d:\d\d\] ", re.MULTILINE), "[DATE] "),  # of strategy.print
    (re.compile(r"\b\d+\.\d+s( \(\d+:\d\d:\d\d\))?"), "0s"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00|Z)"), "DATE"),
]
"""What differs from run to run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    comment: str
    line: int

    @property
    def end(self) -> int:
        """The line that closes it."""
        return self.line + self.text.count("\n") + 1

    @property
    def title(self) -> str | None:
        """The name of the file that the block is."""
        match = _TITLE.match(self.text)
        return match[1] if match else None

    @property
    def source(self) -> Path | None:
        """The file of this repository that the block is an excerpt of."""
        path = ROOT / self.comment
        return path if self.comment and path.is_file() else None

    @property
    def reason(self) -> str | None:
        """Why this page's test does not run the block."""
        kind, _, reason = self.comment.partition(": ")
        is_explained = kind == "not run" or (kind == "tested by" and (ROOT / reason).is_file())
        return reason.strip() or None if is_explained else None

    def commands(self) -> Iterator[tuple[str, str | None]]:
        """Yield each command, and what the page says that it prints; None if it says nothing."""
        text = self.text.replace("\\\n", "")
        if self.language == "console" or text.startswith("$ "):
            for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                line, _, output = command.partition("\n")
                yield line, output
        else:
            yield from ((line, None) for line in text.splitlines() if line.strip() and not line.startswith("#"))


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page."""
    return [
        Block(match["language"], _dedented(match), match["comment"] or "", page[: match.start("language")].count("\n") + 1)
        for match in _BLOCK.finditer(page)
    ]  # fmt: skip


def _dedented(match: re.Match[str]) -> str:
    return re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)


def is_excerpt(excerpt: str, source: str) -> bool:
    """Return whether all lines of ``excerpt`` are in ``source``, in this order; only where it says ``...`` are lines left out."""
    parts = re.split(r"^\s*(?:# )?\.\.\.\n", excerpt, flags=re.MULTILINE)
    position = 0
    for part in parts:
        position = source.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def run(page: str, folder: Path) -> None:
    """Do in ``folder`` what a reader does with the code blocks of a page.

    Raises:
        AssertionError: Something differs from what the page says; notes the line.
    """
    found = blocks(page)
    for block, following in zip(found, [*found[1:], None], strict=True):
        try:
            _run(block, following, folder)
        except AssertionError as error:
            error.add_note(f"in the block at line {block.line}")
            raise


def _run(block: Block, following: Block | None, folder: Path) -> None:
    if block.reason:
        return
    if block.source:
        source = block.source.read_text(encoding="utf-8")
        assert is_excerpt(block.text, source), f"not in {block.source}"
        if block.text == source:
            (folder / block.source.name).write_text(source, encoding="utf-8")
    elif block.comment:
        raise AssertionError(f"the comment above a block explains nothing, or names no file: {block.comment}")
    elif block.title:
        (folder / block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        (folder / "block.py").write_text(block.text, encoding="utf-8")
        is_output = following and following.language == "text" and following.line == block.end + 2
        _check("python block.py", following.text if following and is_output else None, folder)
    elif block.language in ("console", "sh", "bash", ""):
        for command, output in block.commands():
            _check(command, output, folder)
    elif block.language not in ("text", "mermaid"):
        raise AssertionError(f"a block in {block.language} that no comment explains")


def _check(command: str, expected: str | None, folder: Path) -> None:
    """Run ``command``. It may fail only if the page shows its error."""
    code, output, failures = execute(command, folder)
    errors = "".join(failures)
    everything = f"$ {command}\nexit code {code}\n{output}\n{errors[-6000:]}"
    if expected is None:
        assert code == 0, everything
    elif code == 0:
        assert _as_pattern(expected).fullmatch(_steady(output, folder)), f"{everything}\nthe page says:\n{expected}"
    else:
        shown = [line for line in _steady(expected).splitlines() if line != "..."]
        assert shown, everything
        assert all(shown[-1] in _steady(each, folder).splitlines() for each in failures), everything
        assert _as_pattern(expected).search(_steady(output + errors, folder)), everything


def _steady(text: str, folder: Path | None = None) -> str:
    text = text.replace(str(folder), FOLDER) if folder else text
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text.strip() + "\n" if text.strip() else ""


def _as_pattern(expected: str) -> re.Pattern[str]:
    pieces = re.split(r"^\.\.\.\n", _steady(expected), flags=re.MULTILINE)
    return re.compile("(?:.*\n)*?".join(map(re.escape, pieces)))


# Commands


def execute(command: str, folder: Path) -> tuple[int, str, list[str]]:
    """Run one command line: its exit code, what it wrote to stdout, and what each process that failed wrote to stderr."""
    words = shlex.split(command, comments=True)
    assigned = [word for word in words if re.match(r"[A-Z_]+=", word)]
    program, *arguments = words[len(assigned) :]
    environment = dict(word.split("=", 1) for word in assigned)
    is_plain = not re.search(r"[|&;<>$`*]", command)
    if is_plain and program == "python" and arguments[0].endswith(".py"):
        return _forked(arguments, 1, environment, folder)
    if is_plain and program in MODULES:
        return _forked(["-m", MODULES[program], *arguments], 1, environment, folder)
    if is_plain and program == "torchrun" and arguments[0] == "--nproc-per-node":
        return _forked(arguments[2:], int(arguments[1]), environment, folder)
    return _in_shell(command, folder)


def _in_shell(command: str, folder: Path) -> tuple[int, str, list[str]]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PET_MASTER_PORT"] = str(free_port())  # a default of torchrun
    command = re.sub(r"(127\.0\.0\.1):\d+", rf"\1:{free_port()}", command)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{command}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout, [done.stderr]


def _forked(
    arguments: Sequence[str], ranks: int, variables: dict[str, str], folder: Path
) -> tuple[int, str, list[str]]:
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    places: list[dict[str, str]] = [{}]
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    files = [[folder / f".{stream}-{rank}" for stream in ("stdout", "stderr")] for rank in range(ranks)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = []
    for place, streams in zip(places, files, strict=True):
        for file in streams:
            file.write_bytes(b"")
        processes.append(context.Process(target=_script, args=(arguments, environment | place, folder, streams)))
    deadline = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()
    output, errors = ([_text(file) for file in stream] for stream in zip(*files, strict=True))
    assert not late, f"ranks {late} did not end within {SECONDS:.0f} s:\n{''.join(output)}\n{''.join(errors)}"
    codes = [abs(process.exitcode or 0) for process in processes]
    return max(codes), "".join(output), [text for code, text in zip(codes, errors, strict=True) if code]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _script(arguments: list[str], environment: dict[str, str], folder: Path, files: Sequence[Path]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    import torch

    torch.set_num_threads(1)
    sys.argv = arguments if arguments[0] != "-m" else arguments[1:]
    sys.path.insert(0, str(folder))
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
