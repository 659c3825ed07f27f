"""Tensors and errors as JSON, bit for bit, and the arguments of collectives from descriptions."""

import base64
import hashlib
from typing import Any

import torch

Record = dict[str, Any]
"""Plain data with named parts: what describes a tensor, how to sample, what an operation returned."""


def encode(value: object) -> Any:
    """Encode numbers, strings, lists, dicts with any keys, and tensors as JSON."""
    if isinstance(value, torch.Tensor):
        body = base64.b64encode(_bytes_of(value)).decode()
        name = str(value.dtype).removeprefix("torch.")
        return {"tensor": name, "shape": list(value.shape), "bytes": body, "device": value.device.type}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return {"float": value.hex()}
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(
        f"expected numbers, text, tensors, or lists and dicts of them, got {type(value).__name__} ({value!r})"
    )


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor, in order."""
    row = tensor.detach().cpu().contiguous().reshape(-1)
    if len(row) == 1:  # contiguous with any stride, but a view in another dtype needs a stride of 1
        row = row.as_strided((1,), (1,))
    content: bytes = row.view(torch.uint8).numpy().tobytes()
    return content


def decode(value: object) -> Any:
    """The inverse of `encode`, except that tuples become lists."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, value["tensor"])
        data = bytearray(base64.b64decode(value["bytes"]))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(dtype).reshape(value["shape"])
    if isinstance(value, dict) and "dict" in value:
        return {decode(key): decode(item) for key, item in value["dict"]}
    if isinstance(value, dict) and "float" in value:
        return float.fromhex(value["float"])
    return value


def error_record(error: BaseException) -> Record:
    """An exception as data: the names of its class and its base classes, and its message."""
    types = [f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.") for cls in type(error).__mro__[:-1]]
    return {"error": types, "message": _message(error)}


def _message(error: BaseException) -> str:
    """The message, with characters that cannot be encoded escaped."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception as other:  # noqa: BLE001 - its own __str__ may raise anything
        return f"no message: str() raised {type(other).__name__}"


LARGEST_SHOWN = 4096
"""Elements of the largest tensor that an observation of a state contains."""


def plain(value: object) -> object:
    """``value`` for the observation of a state: a tensor as this rank's part of it, or its digest if it is large."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value if value is None or isinstance(value, (bool, int, float, str)) else digest(value)
    local = getattr(value, "_local_tensor", value).detach().cpu().clone()
    return local if local.numel() <= LARGEST_SHOWN else digest(local)


def digest(value: object) -> str:
    """A digest of nested tensors and plain values, bit for bit."""
    hasher = hashlib.blake2b(digest_size=12)
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: hashlib.blake2b, value: object) -> None:
    if isinstance(value, torch.Tensor):
        local = getattr(value, "_local_tensor", value)
        hasher.update(f"{local.dtype}{tuple(local.shape)}".encode())
        hasher.update(_bytes_of(local))
    elif isinstance(value, dict):
        for key, item in value.items():
            hasher.update(repr(key).encode())
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(repr(value).encode())


def materialize(description: object, rank: int, device: torch.device | str = "cpu") -> Any:
    """The argument of a collective on ``rank``, from its description.

    ``{"by_rank": [...]}`` is one of several descriptions, ``{"per_rank": [base, step]}`` the number base + step x rank,
    ``{"dict": [[key, description], ...]}`` a dict, ``{"text": s}`` a string, and
    ``{"tensor": dtype, "shape": [...], "seed": n}`` a tensor that differs between ranks (``"transposed"``: with the
    memory layout of its transpose; ``"grad"``: it requires a gradient). Anything else stands for itself.
    """
    if isinstance(description, dict) and "by_rank" in description:
        return materialize(description["by_rank"][rank % len(description["by_rank"])], rank, device)
    if isinstance(description, dict) and "dict" in description:
        return {key: materialize(item, rank, device) for key, item in description["dict"]}
    if isinstance(description, dict) and "tensor" in description:
        tensor = _tensor(description, rank).to(device)
        tensor = tensor.mT.contiguous().mT if description.get("transposed") else tensor
        return tensor.requires_grad_() if description.get("grad") else tensor
    if isinstance(description, dict) and "text" in description:
        return description["text"]
    if isinstance(description, dict) and "per_rank" in description:
        base, step = description["per_rank"]
        return base + step * rank
    return description


def _tensor(description: Record, rank: int) -> torch.Tensor:
    dtype = getattr(torch, description["tensor"])
    if "fill" in description:
        return torch.full(description["shape"], description["fill"], dtype=dtype)
    generator = torch.Generator().manual_seed(7919 * description["seed"] + rank)
    shape = list(description["shape"])
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        low, high = (0, 40) if dtype == torch.uint8 else (-30, 30)
        large = 2**54 + 1 if dtype == torch.int64 else 1  # larger than float64 represents exactly
        return (torch.randint(low, high, shape, generator=generator) * large).to(dtype)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
