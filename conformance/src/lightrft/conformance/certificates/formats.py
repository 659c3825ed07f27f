"""Writes a certificate as Markdown, HTML, JSON and a badge."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import jinja2

from lightrft.conformance.certificates.certificate import FAILED, Certificate, Code, run_name


def markdown_text(text: str) -> str:
    """One line of Markdown, also for cells of tables, without HTML, links and images; code and emphasis stay."""
    return re.sub(r"[&<|\\]|(?<=\])[(\[]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


class _Markdown(str):
    """Text that is Markdown already."""


def _code(text: str) -> _Markdown:
    """A code span, also for cells of tables."""
    fence = "`" * (1 + _longest_fence(text))
    padding = " " if len(fence) > 1 else ""
    return _Markdown(f"{fence}{padding}{' '.join(text.split()).replace('|', chr(92) + '|')}{padding}{fence}")


def _code_block(lines: Iterable[str]) -> _Markdown:
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + _longest_fence(text))
    return _Markdown(f"{fence}\n{text}\n{fence}")


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _finalized(value: object) -> object:
    """Escape what a template of Markdown inserts, except the results of filters for code."""
    return value if isinstance(value, _Markdown) else markdown_text(str(value))


_NO_TEXT: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters and others that XML and HTML cannot contain, not even escaped."""


def _rendered(template: str, certificate: Certificate) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightrft.conformance"),
        autoescape=not template.endswith(".md"),
        finalize=_finalized if template.endswith(".md") else None,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"code": _code, "code_block": _code_block, "run_name": run_name, "text_width": _text_width}
    text = environment.get_template(template).render(
        certificate=certificate,
        badge=badge_text(certificate),
        origin=_origin,
        failed=certificate.remarks(*FAILED),
        expected=certificate.remarks("xfail"),
        notes=certificate.remarks("skip", "pass"),
    )
    return _NO_TEXT.sub("", text)


def _origin(code: Code) -> str:
    """The distribution and its version, or the source file of code without a distribution."""
    if not code.distribution:
        return f"no distribution; {code.source or 'unknown source'}"
    needs = ", ".join(f"{name} {version}" for name, version in code.requirements.items())
    return f"{code.distribution} {code.version}" + (f" (with {needs})" if needs else "")


def badge_text(certificate: Certificate) -> str:
    """The right half of the badge."""
    worlds = sorted({run.world_size for run in certificate.runs})
    devices = sorted({run.device for run in certificate.runs} - {"cpu"})
    exceptions = sum(clause.verdict == "xfail" for clause in certificate.clauses)
    verdict = f"LightRFT {certificate.verdict}"
    if exceptions and certificate.verdict in ("certified", "checked"):
        verdict += f", {exceptions} exception{'s' if exceptions > 1 else ''}"
    return " · ".join([verdict, f"{'rank' if worlds == [1] else 'ranks'} {', '.join(map(str, worlds))}", *devices])


def _text_width(text: str) -> int:
    """The approximate width of ``text`` in 11 px Verdana, to which the badge stretches it."""
    return round(sum(3.9 if character in "ijl,.:|()[]'· tfr" else 7.0 for character in text))


FORMATS: Final[dict[str, Callable[[Certificate], str]]] = {
    ".md": partial(_rendered, "certificate.md"),
    ".html": partial(_rendered, "certificate.html"),
    ".svg": partial(_rendered, "badge.svg"),
    ".json": lambda certificate: certificate.model_dump_json(indent=1, by_alias=True) + "\n",
}
"""Renders a certificate, by the suffix of the file."""
