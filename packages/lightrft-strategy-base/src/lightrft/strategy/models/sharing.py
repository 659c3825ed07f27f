"""Whether two models share parameters: a critic on the actor's backbone, a reference model with the actor's embedding."""

import weakref

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightrft.strategy.tensors import local_part


class ParameterMemory:
    """The parameters of a model before it was wrapped, and their memory. Keeps neither alive."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {id(parameter): weakref.ref(parameter) for parameter in module.parameters()}
        self._ranges: dict[StorageWeakRef, list[range]] = {}
        for parameter in module.parameters():
            storage, elements = _memory(parameter)
            self._ranges.setdefault(storage, []).append(elements)

    def overlaps(self, parameter: nn.Parameter) -> bool:
        """Return whether ``parameter`` is one of the model's, or uses the memory of one."""
        known = self._parameters.get(id(parameter))
        if known is not None and known() is parameter:
            return True
        storage, elements = _memory(parameter)
        return any(
            elements.start < other.stop and other.start < elements.stop for other in self._ranges.get(storage, ())
        )


def _memory(parameter: nn.Parameter) -> tuple[StorageWeakRef, range]:
    """Return the storage of ``parameter``, and the bytes in it."""
    tensor = local_part(parameter)
    begin = tensor.storage_offset() * tensor.element_size()
    return StorageWeakRef(tensor.untyped_storage()), range(begin, begin + tensor.nbytes)
