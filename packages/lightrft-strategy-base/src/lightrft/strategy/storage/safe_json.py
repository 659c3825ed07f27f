"""Python values as JSON and back, unchanged; values without a safe JSON form are refused, with their path.

Plain JSON turns tuples into lists and keys into strings, and has no bytes: such values are stored in an object with one
marked key. Decoding creates only the types below; it never looks up a name from the text.
"""

import base64
import json
import math
from collections import Counter
from types import NoneType
from typing import Any

from lightrft.config import ArgumentTypeError, CheckpointError

_MARK = "$"
_MAX_DEPTH = 200
_TYPES = (bool, int, float, str, bytes, list, tuple, Counter, dict)


def to_json(value: object, name: str, *, exact: bool = True) -> Any:
    """Return ``value`` as JSON values.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict and Counter, nested.
        name: The name of the value in errors.
        exact: Refuse instances of subclasses of these types, which would come back as the base type; False converts them.

    Raises:
        ArgumentTypeError: ``value`` contains a value of another type; the message has its path.
    """
    return _encode(value, name, 0, exact)


def _encode(value: Any, path: str, depth: int, exact: bool) -> Any:
    if depth > _MAX_DEPTH:
        raise ArgumentTypeError(
            f"{path[:200]}: expected at most {_MAX_DEPTH} levels of nesting, got more, or a cycle. Flatten it"
        )

    def encode(item: object, path: str) -> Any:
        return _encode(item, path, depth + 1, exact)

    cls = (
        type(value)
        if exact
        else next((known_type for known_type in _TYPES if isinstance(value, known_type)), type(value))
    )
    if cls is NoneType or cls is bool:
        return value
    if cls is int:
        return int(value) if abs(value) < 2**63 else {f"{_MARK}int": hex(value)}
    if cls is float:
        return float(value) if math.isfinite(value) else {f"{_MARK}float": repr(float(value))}
    if cls is str:
        return str.__str__(value)
    if cls is bytes:
        return {f"{_MARK}bytes": base64.b64encode(value).decode("ascii")}
    if cls is list or cls is tuple:
        items = [encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return items if cls is list else {f"{_MARK}tuple": items}
    if cls is dict or cls is Counter:
        pairs = [(encode(key, f"{path} (key)"), encode(item, f"{path}[{_shown(key)}]")) for key, item in value.items()]
        return _encoded_pairs(pairs, cls)
    raise ArgumentTypeError(
        f"{path}: expected None, bool, int, float, str, bytes, list, tuple or dict, got a {type(value).__module__}."
        f"{type(value).__qualname__}, which would not load as the same type. Store an enum's .value, a NumPy scalar's "
        f".item(), an array's or a tensor's .tolist()"
    )


def _shown(key: object) -> str:
    """Return a key for messages: Python refuses to write very long integers in decimal."""
    return hex(key) if isinstance(key, int) and abs(key) >= 2**63 else repr(key)


def _encoded_pairs(pairs: list[tuple[Any, Any]], cls: type) -> Any:
    if cls is Counter:
        return {f"{_MARK}counter": [list(pair) for pair in pairs]}
    if all(isinstance(key, str) and not key.startswith(_MARK) for key, _ in pairs):
        return dict(pairs)
    return {f"{_MARK}dict": [list(pair) for pair in pairs]}


def from_json(value: object) -> Any:
    """Return the value that `to_json` encoded. Raise `CheckpointError` for JSON that `to_json` never produces."""
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
    decoders: dict[str, Any] = {
        "int": lambda: int(content, 16),
        "float": lambda: float(content),
        "bytes": lambda: base64.b64decode(content, validate=True),
        "tuple": lambda: tuple(from_json(item) for item in content),
        "dict": lambda: {from_json(key): from_json(item) for key, item in content},
        "counter": lambda: Counter({from_json(key): from_json(item) for key, item in content}),
    }
    decoder = decoders.get(mark.removeprefix(_MARK))
    if decoder is None:
        raise CheckpointError(
            f"expected a stored value of a known type, got {mark!r}. A later version wrote it: upgrade lightrft-strategy-base"
        )
    return decoder()


def dumps(value: object) -> str:
    """Return JSON text; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
