"""What to certify: a request, the clauses that it selects, and what of it is impossible whatever the strategy does."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightrft.config import LightRFTError
from lightrft.conformance.clause import Clause, Settings
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.expectations import Expectations
from lightrft.conformance.profiles import MOST_PROCESSES
from lightrft.strategy.registry import ENGINES, STRATEGIES, load, registered


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to certify, and how."""

    strategy: str
    world: int = 1
    device: str = "cpu"
    profile: str = "ci"
    settings: Settings = field(default_factory=dict)
    clauses: Sequence[str] = ()
    seed: int = 0
    expectations: Path | None = None
    engine: str = ""
    """The engine to certify, on ``strategy``; empty to certify the strategy."""
    deadline_factor: float = 1.0
    """Factor of the deadlines of programs; below 1 where a hang is expected."""

    def command(self, clause: str | None = None) -> str:
        """The command line that repeats this run, or one clause of it."""
        parts = ["lightrft-conformance", "run", self.strategy]
        if self.engine:
            parts = ["lightrft-conformance", "run-engine", self.engine, "--strategy", self.strategy]
        parts += ["--world-size", str(self.world), "--device", self.device]
        for name, value in self.settings.items():
            parts += ["--set", _setting_text(name, value)]
        parts += ["--profile", self.profile, "--seed", str(self.seed)]
        parts += ["--expected", str(self.expectations)] if self.expectations else []
        for clause_id in [clause] if clause else self.clauses:
            parts += ["--clause", clause_id]
        return shlex.join(parts)


def setting(text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE``. The value is JSON, or else a string. Raises ValueError without ``=``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value.lower() if value in ("True", "False", "None") else value)
    except (json.JSONDecodeError, RecursionError):
        return name, value


def _setting_text(name: str, value: object) -> str:
    """``NAME=VALUE``, such that `setting` parses it."""
    text = f"{name}={value}"
    return text if setting(text) == (name, value) else f"{name}={json.dumps(value)}"


MODEL_LIBRARY_ENGINES = ("transformers", "vllm", "sglang")
"""Engines that only run models of transformers."""
ENGINE_CLAUSES = ("ENG-", "SYNC-", "GEN-", "LIFE-5", "ALL-1")


def selected(ids: Sequence[str], *, engine: bool = False) -> Iterator[Clause]:
    """The clauses with these ids, or all, in the order to judge them; for an ``engine``, only clauses about engines."""
    for clause in sorted(CONTRACT, key=lambda clause: clause.ends_workers):
        if (not ids or clause.id in ids) and (not engine or clause.id.startswith(ENGINE_CLAUSES)):
            yield clause


OPTIONS = {"strategy": "the argument that names the strategy", "device": "--device"}
"""Settings that a request has fields for, with what sets them on the command line."""


SINGLE_PROCESS = ("fake",)
"""Registered strategies that are one process, whatever the device."""


def impossible(request: Request) -> str:
    """Why the request cannot be carried out, if that is known before any process starts; empty otherwise."""
    return (
        _unknown_name(STRATEGIES, request.strategy)
        or (_unknown_name(ENGINES, request.engine) if request.engine else "")
        or _wrong_numbers(request)
        or _wrong_clauses(request)
        or _wrong_settings(request)
        or _wrong_expectations(request)
    )


def _unknown_name(group: str, name: str) -> str:
    """Why ``name`` cannot be loaded, unless its code has to be imported to know it."""
    if name in registered(group) or ":" in name:
        return ""
    try:
        load(group, name, object)
    except LightRFTError as error:
        return str(error)
    return ""


def _wrong_numbers(request: Request) -> str:
    if not 1 <= request.world <= MOST_PROCESSES:
        return f"expected a world size from 1 to {MOST_PROCESSES}, because all ranks run here, got {request.world}. Lower it"
    if request.seed < 0:
        return f"expected a seed from 0, got {request.seed}. Use another"
    if request.strategy in SINGLE_PROCESS and request.world > 1:
        return (
            f"expected world size 1, because {request.strategy} is one process, got {request.world}. Use --world-size 1"
        )
    return ""


def _wrong_clauses(request: Request) -> str:
    unknown = [clause_id for clause_id in request.clauses if clause_id not in CONTRACT.ids]
    if unknown:
        return f"unknown clauses: {', '.join(unknown)}; `lightrft-conformance clauses` lists them"
    possible = {clause.id for clause in selected(request.clauses, engine=bool(request.engine))}
    others = [clause_id for clause_id in request.clauses if clause_id not in possible]
    return (
        f"{', '.join(others)}: not about engines; `lightrft-conformance run` judges it on a strategy" if others else ""
    )


def _wrong_settings(request: Request) -> str:
    for name in sorted(OPTIONS.keys() & request.settings.keys()):
        got = f"{name}={request.settings[name]}"
        return f"--set: expected a setting that has no option of its own, got {got}. Use {OPTIONS[name]}"
    return ""


def _wrong_expectations(request: Request) -> str:
    """What is wrong with the file of expected failures."""
    try:
        return Expectations.read(request.expectations, request.strategy, request.settings).unknown(CONTRACT.ids)
    except (OSError, ValueError) as error:
        return f"cannot read the file of expected failures {request.expectations}: {error}"
