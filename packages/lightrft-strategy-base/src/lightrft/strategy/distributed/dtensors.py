"""Whether a tensor is a DTensor, without importing them: that takes as long as torch itself.

Where nobody has imported torch.distributed.tensor, there are none.
"""

import sys
from typing import Any

import torch


def is_dtensor(tensor: object) -> bool:
    """Whether it is one."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other as it is."""
    distributed: Any = tensor
    part: torch.Tensor = distributed.to_local() if is_dtensor(tensor) else tensor
    return part
