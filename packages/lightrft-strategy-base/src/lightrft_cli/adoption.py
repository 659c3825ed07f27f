"""`lightrft adopt`: runs a clone of LightRFT on this layer without changing its files.

A .pth file in the environment's site-packages installs `CloneFinder` at every Python startup, so that it works under
torchrun, in worker processes and from any directory.
"""

import ast
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from lightrft_cli.finder import is_clone

_HEADER = "# Written by `lightrft adopt`. To remove it: lightrft adopt --undo\n"
_CALL = "import lightrft_cli.finder; lightrft_cli.finder.install("


class AdoptError(Exception):
    """A clone cannot be adopted or released."""


def pth_file() -> Path:
    """Return the file that installs the finder; its name sorts after those that make editable installs importable."""
    return Path(sysconfig.get_path("purelib")) / "lightrft-adopted.pth"


def adopted_clone() -> Path | None:
    """Return the clone that this environment has adopted.

    Raises:
        AdoptError: The file was changed by hand.
    """
    path = pth_file()
    if not path.is_file():
        return None
    line = path.read_text(encoding="utf-8").removeprefix(_HEADER).strip()
    try:
        return Path(ast.literal_eval(line.removeprefix(_CALL).removesuffix(")")))
    except (SyntaxError, TypeError, ValueError) as error:
        raise AdoptError(f"expected {path} as it was written, got {line!r}. Delete the file") from error


def adopt(root: Path) -> Path:
    """Make this environment import `lightrft` from our packages and from the clone ``root``; return its absolute path.

    Raises:
        AdoptError: ``root`` is not a clone, one is adopted already, or the environment cannot be written.
    """
    clone = root.expanduser().resolve()
    _check_clone(clone)
    adopted = adopted_clone()
    if adopted is not None:
        raise AdoptError(f"expected no adopted clone, got {adopted}. To change it, first run: lightrft adopt --undo")
    try:
        pth_file().write_text(f"{_HEADER}{_CALL}{str(clone)!a})\n", encoding="utf-8")
    except OSError as error:
        raise AdoptError(_refused(error)) from error
    return clone


def undo() -> Path:
    """Remove the finder from this environment; return the clone that was adopted.

    Raises:
        AdoptError: No clone is adopted, or the environment cannot be written.
    """
    clone = adopted_clone()
    if clone is None:
        raise AdoptError(f"expected an adopted clone to undo, got none: there is no {pth_file()}")
    try:
        pth_file().unlink()
    except OSError as error:
        raise AdoptError(_refused(error)) from error
    return clone


def hiding_package() -> str | None:
    """Return why our packages cannot be imported and what to do, if another package `lightrft` hides them."""
    try:
        spec = find_spec("lightrft")
    except ImportError as error:  # CloneFinder's
        return str(error)
    if spec is None or PathFinder.find_spec("lightrft.config", spec.submodule_search_locations) is not None:
        return None
    root = Path(spec.origin or "").parents[1]
    if is_clone(str(root)):
        return f"the clone of LightRFT in {root} hides the packages of this layer. Run: lightrft adopt {root}"
    return f"the package {spec.origin} hides the packages of this layer. Run: pip uninstall lightrft"


def _check_clone(clone: Path) -> None:
    if (clone / "lightrft/config").is_dir():
        raise AdoptError(
            f"expected a clone of LightRFT, got {clone}, which holds packages of this layer. Pass the clone"
        )
    if not is_clone(str(clone)):
        remedy = f"Pass {clone.parent}" if is_clone(str(clone.parent)) else "Pass the directory that git cloned"
        raise AdoptError(f"expected a clone of LightRFT (a directory with lightrft/trainer), got {clone}. {remedy}")


def _refused(error: OSError) -> str:
    return f"expected to be able to write {pth_file()}, got: {error.strerror}. Use a virtual environment"
