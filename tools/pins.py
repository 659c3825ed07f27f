"""The constraint file: all that sessions and packages ask for, resolved together, with all that this needs."""

from collections.abc import Sequence

import nox

from tools.projects import ROOT, everything, group
from tools.uv import uv

PINS = ROOT / "constraints/cpu.txt"
HEADER = """\
# Versions that are tested together, on CPU. Made by `nox -s constraints` with Python 3.11, from the metadata of the
# packages and the dependency groups in pyproject.toml. Versions that are here already are kept while they fit, and
# `nox -s constraints -- --upgrade` takes the newest. torch's local version is left out, so that any build of it fits.
"""


def pin(session: nox.Session) -> None:
    """Write it anew."""
    pins = [*_resolved(session, everything()), *_resolved(session, group("model"), "--no-deps")]
    PINS.write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")


def _resolved(session: nox.Session, requirements: Sequence[str], *options: str) -> list[str]:
    asked, answer = (session.cache_dir.resolve() / name for name in ("requirements.in", "requirements.txt"))
    asked.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    answer.write_text(PINS.read_text(encoding="utf-8"), encoding="utf-8")  # what uv finds there, it keeps
    form = ("--python-version=3.11", "--no-header", "--no-annotate", "--output-file", answer)
    uv(session, "pip", "compile", asked, *form, *options, *session.posargs)
    lines = answer.read_text(encoding="utf-8").splitlines()
    return [line.partition("+")[0] if line.startswith("torch==") else line for line in lines]
