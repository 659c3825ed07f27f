"""A griffe extension for the API reference: names in docstrings become links, and ``::`` before an example becomes a colon."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import griffe

NAME = re.compile(r"(?<![`\w\[])`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites docstrings as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package, when all its names can be looked up."""
        for obj in _objects(pkg):
            if obj.docstring:
                text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
                obj.docstring.value = NAME.sub(partial(_link, obj), text)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(obj: griffe.Object, match: re.Match[str]) -> str:
    try:
        path = obj.resolve(match[1])
    except griffe.NameResolutionError:
        return match[0]
    return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>'
