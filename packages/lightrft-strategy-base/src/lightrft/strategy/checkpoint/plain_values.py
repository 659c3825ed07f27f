"""Python values as JSON and back, equal to what they were; what has no safe form is refused, by its place.

JSON alone would make lists of tuples, strings of keys, and nothing of bytes: these travel in an object with a
single, marked key. Reading builds nothing but the types below; no name in the text is ever looked up.
"""

import base64
import json
import math
from collections import Counter
from types import NoneType
from typing import Any

from lightrft.config import ArgumentTypeError, CheckpointError

_MARK = "$"
_DEEPEST = 200
_KINDS = (bool, int, float, str, bytes, list, tuple, Counter, dict)


def to_json(value: Any, name: str, *, exact: bool = True) -> Any:
    """``value`` as JSON values. ``name``: what it is called in errors.

    Raises `ArgumentTypeError`, with the place of the value, for anything but None, bool, int, float, str, bytes, list,
    tuple, dict and Counter. What is of a type below these would not come back as it is: unless ``exact`` is False,
    where it counts as one of these, it raises too.
    """
    return _encode(value, name, 0, exact)


def _encode(value: Any, place: str, depth: int, exact: bool) -> Any:
    if depth > _DEEPEST:
        raise ArgumentTypeError(f"{place[:200]}: nested more than {_DEEPEST} deep, or contains itself")

    def inside(item: Any, where: str) -> Any:
        return _encode(item, where, depth + 1, exact)

    kind = type(value) if exact else next((it for it in _KINDS if isinstance(value, it)), type(value))
    if kind is NoneType or kind is bool:
        return value
    if kind is int:
        return int(value) if abs(value) < 2**63 else {f"{_MARK}int": hex(value)}
    if kind is float:
        return float(value) if math.isfinite(value) else {f"{_MARK}float": repr(float(value))}
    if kind is str:
        return str.__str__(value)
    if kind is bytes:
        return {f"{_MARK}bytes": base64.b64encode(value).decode("ascii")}
    if kind is list or kind is tuple:
        items = [inside(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if kind is list else {f"{_MARK}tuple": items}
    if kind is dict or kind is Counter:
        pairs = [
            (inside(key, f"a key of {place}"), inside(item, f"{place}[{_shown(key)}]")) for key, item in value.items()
        ]
        return _encoded_pairs(pairs, kind)
    raise ArgumentTypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which would not come back as it is; store None, "
        f"bool, int, float, str, bytes, list, tuple or dict (of an enum its .value, of a NumPy scalar its .item(), of an "
        f"array or a tensor its .tolist())"
    )


def _shown(key: Any) -> str:
    """Of an int as many digits as Python writes."""
    return hex(key) if isinstance(key, int) and abs(key) >= 2**63 else repr(key)


def _encoded_pairs(pairs: list[tuple[Any, Any]], kind: type) -> Any:
    if kind is Counter:
        return {f"{_MARK}counter": [list(pair) for pair in pairs]}
    if all(isinstance(key, str) and not key.startswith(_MARK) for key, _ in pairs):
        return dict(pairs)
    return {f"{_MARK}dict": [list(pair) for pair in pairs]}


def from_json(value: Any) -> Any:
    """What `to_json` made ``value`` of. Raises `CheckpointError` for what it never makes."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, content), *_ = value.items()
        if key.startswith(_MARK):
            return _unmark(key, content)
    return {key: from_json(item) for key, item in value.items()}


def _unmark(mark: str, content: Any) -> Any:
    makers: dict[str, Any] = {
        "int": lambda: int(content, 16),
        "float": lambda: float(content),
        "bytes": lambda: base64.b64decode(content, validate=True),
        "tuple": lambda: tuple(from_json(item) for item in content),
        "dict": lambda: {from_json(key): from_json(item) for key, item in content},
        "counter": lambda: Counter({from_json(key): from_json(item) for key, item in content}),
    }
    maker = makers.get(mark.removeprefix(_MARK))
    if maker is None:
        raise CheckpointError(f"stored value of an unknown kind, {mark!r}; it was written by a later version")
    return maker()


def dumps(value: Any) -> str:
    """JSON text; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
