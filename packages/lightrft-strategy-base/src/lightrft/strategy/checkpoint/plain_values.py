"""Python values as JSON and back, equal to what they were; what has no safe form is refused, by its place.

JSON alone would make lists of tuples, strings of keys, and nothing of bytes: these travel in an object with a
single, marked key. Reading builds nothing but the types below; no name in the text is ever looked up.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightrft.config import ArgumentTypeError, CheckpointError

_MARK = "$"
_DEEPEST = 200


def to_json(value: Any, name: str) -> Any:
    """``value`` as JSON values. ``name``: what it is called in errors.

    Raises `ArgumentTypeError` for anything but None, bool, int, float, str, bytes, list, tuple and dict.
    """
    return _encode(value, name, 0)


def _encode(value: Any, place: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ArgumentTypeError(f"{place[:200]}: nested more than {_DEEPEST} deep, or contains itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else {f"{_MARK}int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {f"{_MARK}float": repr(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return {f"{_MARK}bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {f"{_MARK}tuple": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, place, depth)
    raise ArgumentTypeError(
        f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored safely; store None, "
        f"bool, int, float, str, bytes, list, tuple or dict (a tensor or an array: its .tolist())"
    )


def _encode_mapping(value: Mapping[Any, Any], place: str, depth: int) -> Any:
    pairs = [
        (_encode(key, f"a key of {place}", depth + 1), _encode(item, f"{place}[{key!r}]", depth + 1))
        for key, item in value.items()
    ]
    if isinstance(value, Counter):
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
