"""Lets torchvision's Python part import beside a CPU build of torch, with which its compiled part does not load.

Python runs this at start, by way of a .pth file, in environments that ask for it: torchvision declares how its operators
behave without data, and for that they must be known to torch by name.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing, and tells torch of the operators when torchvision is looked for."""

    library: object = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + SIGNATURE)
            _BeforeTorchvision.library = library  # it lasts as long as it is held
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
