"""The constraint file: the requirements of all packages and sessions, resolved together."""

from collections.abc import Sequence

import nox

from tools.projects import ROOT, everything, group
from tools.uv import uv

PINS = ROOT / "constraints/cpu.txt"
HEADER = """\
# Versions that are tested together, on CPU. `nox -s constraints` writes this file with Python 3.11, from the metadata of
# the packages and the dependency groups in pyproject.toml. It keeps the versions listed here as long as they satisfy the
# metadata; `nox -s constraints -- --upgrade` takes the newest. torch has no local version here, so that any build fits.
"""


def pin(session: nox.Session) -> None:
    """Resolve, and write the file."""
    pins = [*_resolved(session, everything()), *_resolved(session, group("model"), "--no-deps")]
    PINS.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")


def _resolved(session: nox.Session, requirements: Sequence[str], *options: str) -> list[str]:
    source, output = (session.cache_dir.resolve() / name for name in ("requirements.in", "requirements.txt"))
    source.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    output.write_text(PINS.read_text(encoding="utf-8"), encoding="utf-8")  # uv keeps the versions in its output file
    form = ("--python-version=3.11", "--no-header", "--no-annotate", "--output-file", output)
    uv(session, "pip", "compile", source, *form, *options, *session.posargs)
    lines = output.read_text(encoding="utf-8").splitlines()
    return [line.partition("+")[0] if line.startswith("torch==") else line for line in lines]
