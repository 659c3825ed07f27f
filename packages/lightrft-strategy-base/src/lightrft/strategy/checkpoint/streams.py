"""The random streams of this process: Python's, NumPy's, torch's, and that of the CUDA device, as bytes.

Each rank stores its own. Loaded by another number of ranks, rank r of the new ones takes the streams of rank
r modulo the number that saved.
"""

import json
import random

import numpy as np
import torch

Streams = dict[str, torch.Tensor]
"""By name, 1-D uint8."""


def capture(device: torch.device) -> Streams:
    """The streams as they are now. Draws nothing."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    found = {
        "python": _bytes(random.getstate()),
        "numpy": _bytes([kind, np.asarray(keys).tolist(), *rest]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(streams: Streams, device: torch.device) -> None:
    """Go on from ``streams``; one that is not among them stays as it is."""
    if "python" in streams:
        version, state, gauss = json.loads(streams["python"].numpy().tobytes())
        random.setstate((version, tuple(state), gauss))
    if "numpy" in streams:
        kind, keys, *rest = json.loads(streams["numpy"].numpy().tobytes())
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "torch" in streams:
        torch.set_rng_state(streams["torch"])
    if "cuda" in streams and device.type == "cuda":
        torch.cuda.set_rng_state(streams["cuda"], device)


def _bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
