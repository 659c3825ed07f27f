"""Runs the scripts of differences: in processes that are forked from one that has imported the libraries, which takes longer
than all the scripts, with the environment that torchrun gives to each rank."""

import contextlib
import io
import os
import runpy
import tempfile
from collections.abc import Iterator
from typing import Any

import accelerate  # noqa: F401 - imported before the processes are forked, like the next two
import deepspeed  # noqa: F401
import lightning_fabric  # noqa: F401
from examples.peers.results import DIFFERENCES

from lightrft.conformance.driver.worker_group import LAUNCHER_VARIABLES
from lightrft.conformance.peers.ranks import Ranks
from lightrft.conformance.peers.worker import Rank


def outputs(names: list[str]) -> Iterator[tuple[str, str]]:
    """What each script prints on rank 0: the line that says what is expected, and the one that says what it got.

    Raises:
        SystemExit: A script did not print them, or got what is expected.
        Differs: A script failed.
    """
    with Ranks("examples.peers.scripts:outputs", 2) as ranks:
        for name in names:
            ranks.begin()
            path = DIFFERENCES / name
            command = path.read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[-1]
            printed, *_ = ranks.run(run_script, world=2 if command.startswith("torchrun") else 1, path=str(path))
            lines = dict(line.split(":", 1) for line in printed.splitlines() if line.startswith(("expected:", "got:")))
            if lines.keys() != {"expected", "got"}:
                raise SystemExit(f"{name}: expected a line 'expected:' and a line 'got:', got {printed!r}")
            expected, got = lines["expected"].strip(), lines["got"].strip()
            if expected == got:
                raise SystemExit(f"{name} got what is expected ({got}): remove it with its entries in documented.toml")
            text = f"expected: {expected}\ngot:      {got}"
            print(f"{name}\n{text}", flush=True)
            yield name, text


def run_script(rank: Rank, *, path: str) -> str:
    """Run one script, as `python` does or as torchrun does; what it prints."""
    if rank.world == 1:
        for variable in (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(variable, None)
    tempfile.tempdir = str(rank.folder)
    printed = io.StringIO()
    with contextlib.chdir(rank.folder), contextlib.redirect_stdout(printed):
        _kept.append(runpy.run_path(path, run_name="__main__"))
    return printed.getvalue()


_kept: list[dict[str, Any]] = []
"""What scripts leave is never freed: see `lightrft.conformance.peers.worker`."""
