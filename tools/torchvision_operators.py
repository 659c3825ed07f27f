"""Make torchvision importable with a CPU build of torch, with which its compiled operators do not load.

torchvision registers meta kernels for its operators at import, so torch must know the operators by name. Python runs this
module at start, through a .pth file, in the environments that need it.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the operators when torchvision is first imported; leaves the import to other finders."""

    library: object = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + SIGNATURE)
            _BeforeTorchvision.library = library  # the definitions live as long as this object
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
