"""One model's DeepSpeed engine: reduces, clips, steps, and keeps the master weights."""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import is_dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedConfig, DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.deepspeed import patches
from lightrft.strategy.patching import Patch


class ZeroEngine(DeepSpeedEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """A DeepSpeed engine of a module that has rank 0's weights already.

    The module is called directly, not through the engine: the hooks that a backward pass needs are on the
    parameters and the submodules. The engine's own ``forward`` also hooks the outputs that it finds in tuples, lists and
    dicts; outputs in other containers would go without.
    """

    def __init__(self, module: nn.Module, settings: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Make the engine. All ranks must call this.

        Args:
            module: The model; its parameters are used in place.
            settings: DeepSpeed's configuration.
            optimizer: The optimizer that DeepSpeed takes over; None for a model that does not train.
        """
        config = DeepSpeedConfig(dict(settings))
        # BF16_Optimizer prints memory figures at every log level:
        # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/bf16_optimizer.py#L54
        with redirect_stdout(io.StringIO()):
            super().__init__(args=None, model=module, optimizer=optimizer, config=settings, config_class=config)
        self._undo = ExitStack()

    @override
    def _broadcast_model(self) -> None:
        """Do nothing: the module has rank 0's weights. DeepSpeed's own raises on parameters without dimensions.

        https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/engine.py#L2059
        """

    def patch(self, patch: Patch, target: object) -> None:
        """Apply ``patch`` to ``target``, this engine or its optimizer, until `remove`."""
        self._undo.callback(patch.apply(target))

    def add_gradient(self, loss: torch.Tensor, retain_graph: bool) -> None:
        """Run the backward pass of ``loss``, and add its gradient to those accumulated; ZeRO 2 and 3 reduce it now."""
        # What engine.forward and its output hooks do. Without the first call, ZeRO-3 replaces the gradient of one backward
        # pass by that of the next if there was no forward between them:
        # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage3.py#L2394-L2407
        self.optimizer.clear_backward_seen_flag()
        self.optimizer.set_gradient_accumulation_boundary(False)
        self.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    def update(self, factor: float) -> float:
        """Reduce what is not reduced yet, multiply by ``factor``, clip and step; discard the gradient if ``factor`` is NaN.

        Returns:
            The norm before clipping. If it is not finite on any rank, no rank has stepped.
        """
        with self._scaled(factor):
            self.step()
        return float(self.get_global_grad_norm())

    def fill_missing_gradients(self) -> None:
        """Give a zero gradient to parameters of ZeRO-1 that have none on this rank: another rank may have one."""
        optimizer = self.optimizer
        if isinstance(optimizer, BF16_Optimizer):  # reduces whole groups, but leaves these out of the norm
            for group in optimizer.fp32_groups_has_gradients:
                group[:] = [True] * len(group)
            return
        name = "grad_accum" if optimizer.use_grad_accum_attribute else "grad"
        for parameter in (parameter for group in optimizer.bit16_groups for parameter in group):
            if getattr(parameter, name) is None:
                setattr(parameter, name, torch.zeros_like(parameter, dtype=optimizer.gradient_accumulation_dtype))

    @contextmanager
    def _scaled(self, factor: float) -> Iterator[None]:
        """Multiply the gradient by ``factor`` within the body: in the norm, in clipping, in the step."""
        if factor == 1.0:
            yield
        elif isinstance(self.optimizer, BF16_Optimizer):  # has no loss scale
            torch._foreach_mul_(self.optimizer.fp32_groups_gradients_flat, factor)
            yield
        elif math.isnan(factor):  # with a loss scale of NaN, DeepSpeed would find a finite norm and step
            restore = patches.without_norm(self.optimizer).apply(self.optimizer)
            try:
                yield
            finally:
                restore()
        else:
            self.optimizer.override_loss_scale(1 / factor)
            try:
                yield
            finally:
                self.optimizer.custom_loss_scaler = False

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what DeepSpeed's optimizer holds in addition to the caller's: master weights, gradients, buffers."""
        yield from _tensors_in(vars(self.optimizer))

    def remove(self) -> None:
        """Remove the engine's hooks and patches. The module keeps its parameters as they are."""
        self.module_forward_pre_hook.remove()
        self.module_forward_post_hook.remove()
        self._undo.close()
        flat_groups = getattr(self.optimizer, "bit16_groups", None)
        if flat_groups is not None:  # of stages 1 and 2, which fail to end with a group that a script has appended
            del self.optimizer.optimizer.param_groups[len(flat_groups) :]
        self.destroy()


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_in(vars(value))
