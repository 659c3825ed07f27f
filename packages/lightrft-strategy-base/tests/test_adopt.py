"""`lightrft adopt`, in an environment of its own, with a stand-in for a clone of LightRFT."""

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightrft
import lightrft_cli

TRAIN = """
import sys
from importlib.util import find_spec
import lightrft.config, lightrft.trainer.ppo, lightrft.utils
print(lightrft.trainer.ppo.WHOSE, lightrft.utils.WHOSE, find_spec("lightrft.strategy").origin)
"""
"""A script of the clone; prints whose subpackages it finds."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with this package, and the packages it needs."""

    folder: Path

    @property
    def packages(self) -> Path:
        (folder,) = self.folder.glob("lib/python*/site-packages")
        return folder

    def python(self, *arguments, cwd=None, path=(), code=0):
        """What Python prints: its output if it must succeed, else its errors."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "COVERAGE_CORE": "", "NO_COLOR": "1"}
        command = [self.folder / "bin/python", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd or self.folder, env=variables
        )
        assert done.returncode == code, done.stdout + done.stderr
        return (done.stderr if code else done.stdout).strip()

    def lightrft(self, *arguments, **options):
        return self.python("-m", "lightrft_cli", *arguments, **options)


def our_folders():
    """Each subpackage of ours that is importable here, and the module of the command, by name."""
    subpackages = [folder for root in lightrft.__path__ for folder in Path(root).iterdir() if folder.is_dir()]
    ours = {folder.name: folder for folder in subpackages if not folder.name.startswith("_")}
    return ours, Path(lightrft_cli.__file__).parent


@pytest.fixture
def layout():
    return "editable"


@pytest.fixture
def environment(layout, tmp_path):
    """With our packages in one folder, as wheels are, or in one folder each."""
    made = Environment(tmp_path / "environment")
    venv.create(made.folder, with_pip=False, symlinks=True)
    ours, command = our_folders()
    sources = tmp_path / "sources"
    for name, folder in ours.items():
        root = made.packages if layout == "wheels" else sources / name
        (root / "lightrft").mkdir(parents=True, exist_ok=True)
        (root / "lightrft" / name).symlink_to(folder)
    (made.packages / "lightrft_cli").symlink_to(command)
    listed = [str(sources / name) for name in ours] if layout == "editable" else []
    (made.packages / "_packages.pth").write_text("\n".join([*listed, sysconfig.get_path("purelib")]))
    return made


@pytest.fixture
def clone(tmp_path):
    root = tmp_path / "with spaces, é" / "LightRFT"
    files = {
        "lightrft/__init__.py": "raise RuntimeError('the __init__ of the clone')",
        "lightrft/trainer/__init__.py": "",
        "lightrft/trainer/ppo.py": "WHOSE = 'theirs'",
        "lightrft/utils/__init__.py": "WHOSE = 'theirs'",
        "lightrft/strategy/__init__.py": "raise RuntimeError('the strategies of the clone')",
        "examples/__init__.py": "",
        "examples/train.py": TRAIN,
        "train.py": TRAIN,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


WAYS = {
    "a script in the clone": lambda python, clone: python(clone / "train.py"),
    "a script in the working directory": lambda python, clone: python("train.py", cwd=clone),
    "a script in a subdirectory": lambda python, clone: python("examples/train.py", cwd=clone),
    "a module of the working directory": lambda python, clone: python("-m", "examples.train", cwd=clone),
    "the clone first on the path": lambda python, clone: python("-c", TRAIN, path=[clone]),
    "the clone last on the path": lambda python, clone: python(
        "-c", f"import sys; sys.path.append({str(clone)!r})\n{TRAIN}"
    ),
}


@pytest.mark.parametrize("layout", ["wheels", "editable"])
@pytest.mark.parametrize("way", WAYS)
def test_an_adopted_clone_has_our_strategies_and_its_own_subpackages(environment, clone, way):
    environment.lightrft("adopt", clone)
    theirs, utils, strategy = WAYS[way](environment.python, clone).split(maxsplit=2)
    assert (theirs, utils) == ("theirs", "theirs")
    assert Path(strategy).samefile(our_folders()[0]["strategy"] / "__init__.py")


def test_the_ranks_of_torchrun_find_both(environment, clone):
    environment.lightrft("adopt", clone)
    (clone / "train.py").write_text(f"{TRAIN}\nfrom lightrft.strategy import StrategyBase\n")
    run = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "train.py")
    assert environment.python(*run, cwd=clone).count("strategy/__init__.py") == 2


def test_undo_leaves_the_environment_as_it_was(environment, clone):
    before = sorted(environment.packages.iterdir())
    assert environment.lightrft("adopt", clone) == f"adopted {clone}"
    assert environment.lightrft("adopt", "--status") == str(clone)
    assert environment.lightrft("adopt", "--undo") == f"no longer adopted: {clone}"
    assert sorted(environment.packages.iterdir()) == before
    assert environment.lightrft("adopt", "--status") == "no clone is adopted"
    assert "the __init__ of the clone" in environment.python("train.py", cwd=clone, code=1)


def test_a_deleted_clone_is_ignored(environment, clone):
    environment.lightrft("adopt", clone)
    clone.rename(clone.with_name("moved"))
    assert environment.python("-c", "import lightrft.config; print('found')") == "found"


@pytest.mark.parametrize("argument", ["lightrft", "examples", "nothing", "train.py", "..", "examples/nothing"])
def test_a_directory_that_is_no_clone_is_refused(environment, clone, argument):
    told = environment.lightrft("adopt", clone / argument, code=2)
    remedy = "Pass the directory that git cloned" if "/" in argument or argument == ".." else f"Pass {clone}"
    assert told.startswith("lightrft adopt: expected a clone of LightRFT (a directory with lightrft/trainer)")
    assert remedy in told and "\n" not in told


def test_an_environment_that_mixes_both_is_refused(environment, clone):
    (clone / "lightrft/config").mkdir()
    assert "holds packages of this layer" in environment.lightrft("adopt", clone, code=2)


def test_adopting_or_undoing_twice_is_refused(environment, clone):
    environment.lightrft("adopt", clone)
    assert f"expected no adopted clone, got {clone}" in environment.lightrft("adopt", clone, code=2)
    environment.lightrft("adopt", "--undo")
    told = environment.lightrft("adopt", "--undo", code=2)
    assert "expected an adopted clone to undo, got none" in told and "\n" not in told


@pytest.mark.parametrize("arguments", [(), ("--undo", "--status"), (".", "--undo")])
def test_adopt_and_undo_cannot_be_combined(environment, arguments):
    assert "expected PATH, --undo or --status" in environment.lightrft("adopt", *arguments, code=2)


def test_an_environment_that_cannot_be_written_is_refused(environment, clone):
    (environment.packages / "lightrft-adopted.pth").mkdir()  # root may write everything else
    told = environment.lightrft("adopt", clone, code=2)
    assert told.endswith("lightrft-adopted.pth, got: Is a directory. Use a virtual environment") and "\n" not in told


def test_a_file_that_was_changed_by_hand_is_named(environment):
    (environment.packages / "lightrft-adopted.pth").write_text("# something else\n")
    assert "lightrft-adopted.pth as it was written" in environment.lightrft("adopt", "--status", code=2)


def test_another_clone_on_the_path_is_refused(environment, clone, tmp_path):
    environment.lightrft("adopt", clone)
    other = tmp_path / "other"
    (other / "lightrft/trainer").mkdir(parents=True)
    told = environment.python("-c", "import lightrft.trainer", path=[other], code=1)
    assert f"ImportError: lightrft: expected the adopted clone of LightRFT, {clone}, got another" in told
    assert f"lightrft adopt {other}" in environment.lightrft("convert", "a", "b", path=[other], code=2)


def test_a_clone_that_hides_our_packages_is_named_with_the_command(environment, clone):
    told = environment.lightrft("convert", "checkpoint", "output", path=[clone], code=2)
    assert told == (
        f"lightrft convert: the clone of LightRFT in {clone} hides the packages of this layer. Run: lightrft adopt {clone}"
    )
    environment.lightrft("adopt", clone, path=[clone])
    assert "checkpoint" in environment.lightrft("convert", "checkpoint", "output", path=[clone], code=2)


def test_another_package_that_hides_ours_is_named(environment, tmp_path):
    (tmp_path / "empty/lightrft").mkdir(parents=True)
    (tmp_path / "empty/lightrft/__init__.py").touch()
    assert "pip uninstall lightrft" in environment.lightrft("convert", "a", "b", path=[tmp_path / "empty"], code=2)


def test_help_imports_no_torch(environment, clone):
    code = "import sys, lightrft_cli.main; print({'torch', 'numpy', 'lightrft.config'} & set(sys.modules))"
    assert environment.python("-c", code, path=[clone]) == "set()"


def test_the_start_of_python_imports_only_the_finder(environment, clone):
    listing = "import sys; print(*sys.modules)"
    before = set(environment.python("-c", listing).split())
    environment.lightrft("adopt", clone)
    assert set(environment.python("-c", listing).split()) - before == {"lightrft_cli", "lightrft_cli.finder"}


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="lightrft")
    assert command.load().registered_commands and sys.modules["lightrft_cli.main"]
