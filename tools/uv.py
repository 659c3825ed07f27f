"""Running uv, with pip's package sources."""

import os
import shutil
from pathlib import Path

import nox


def uv(session: nox.Session, *arguments: str | Path, torch: str = "cpu") -> None:
    """Run uv; its output is printed if it fails. ``torch``: the build of torch, as in uv's ``--torch-backend``."""
    command = (_program(session), *map(str, arguments))
    session.run(*command, env=_variables(torch), silent=True, log=False, external=True)


def _program(session: nox.Session) -> str:
    try:
        from uv import find_uv_bin  # installed with nox: nox[uv]

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        return shutil.which("uv") or session.error('uv is not installed; run: pip install "nox[uv]"')


def _variables(torch: str) -> dict[str, str | None]:
    """uv's equivalents of pip's variables. Without a configured source of torch, uv chooses the build ``torch``."""
    variables: dict[str, str | None] = {"UV_NO_PROGRESS": "1", "VIRTUAL_ENV": None}
    links = os.environ.get("PIP_FIND_LINKS")
    if "UV_FIND_LINKS" not in os.environ and links:
        variables["UV_FIND_LINKS"] = ",".join(links.split())
    elif not {"UV_FIND_LINKS", "UV_TORCH_BACKEND"} & set(os.environ):
        variables["UV_TORCH_BACKEND"] = torch
    return variables
