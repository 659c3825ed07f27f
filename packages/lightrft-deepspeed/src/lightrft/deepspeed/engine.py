"""One model's DeepSpeed engine, used for what it is good at, and taken off again."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import is_dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedConfig, DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.deepspeed.agreement import GradientOrder


class Engine(DeepSpeedEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """A DeepSpeed engine for a module whose weights are rank 0's already.

    The module is called by itself, not through the engine: what a backward needs from the engine hangs on the
    parameters and on the submodules. The engine's own ``forward`` hangs more on the outputs that it finds in
    tuples, lists and dicts, and other outputs would go without.
    """

    def __init__(self, module: nn.Module, settings: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        config = DeepSpeedConfig(dict(settings))
        with redirect_stdout(io.StringIO()):  # BF16_Optimizer (0.19.8) prints memory figures at every log level
            super().__init__(args=None, model=module, optimizer=optimizer, config=settings, config_class=config)
        self.order: GradientOrder | None = None
        """Checked before gradients are reduced, where `backward` reduces them."""

    @override
    def _broadcast_model(self) -> None:
        """Nothing: it was done. DeepSpeed's own raises on parameters without dimensions."""

    def add_gradient(self, loss: torch.Tensor, retain_graph: bool) -> None:
        """Run the backward of ``loss`` and add its gradient to the window's; ZeRO 2 and 3 reduce it now."""
        # What engine.forward and its hooks on the outputs do. Without the first, ZeRO-3 replaces the gradient
        # of one backward by that of the next where no forward was between them.
        self.optimizer.clear_backward_seen_flag()
        self.optimizer.set_gradient_accumulation_boundary(False)
        self.backward(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    @override
    def _backward_epilogue(self) -> None:
        """Called by `backward` when all gradients are there and, but for full buckets, none is reduced."""
        if self.order is not None:
            self.order.check()
        super()._backward_epilogue()

    def update(self, factor: float) -> float:
        """Reduce what is left to reduce, multiply by ``factor``, clip, step. Returns the norm before clipping.

        Where the norm is not finite on some rank, nothing is stepped on any.
        """
        with self._scaled(factor):
            self.step()
        return float(self.get_global_grad_norm())

    def fill_missing(self) -> None:
        """Give a zero gradient to parameters of ZeRO-1 that got none here: another rank may have one to reduce."""
        optimizer = self.optimizer
        if isinstance(optimizer, BF16_Optimizer):  # reduces whole groups; what it leaves out is in the norm
            for group in optimizer.fp32_groups_has_gradients:
                group[:] = [True] * len(group)
            return
        name = "grad_accum" if optimizer.use_grad_accum_attribute else "grad"
        for parameter in (parameter for group in optimizer.bit16_groups for parameter in group):
            if getattr(parameter, name) is None:
                setattr(parameter, name, torch.zeros_like(parameter, dtype=optimizer.gradient_accumulation_dtype))

    @contextmanager
    def _scaled(self, factor: float) -> Iterator[None]:
        """The gradient counts ``factor`` times in the body: in the norm, in clipping, in the step."""
        if factor == 1.0:
            yield
        elif isinstance(self.optimizer, BF16_Optimizer):  # knows no loss scale
            torch._foreach_mul_(self.optimizer.fp32_groups_gradients_flat, factor)
            yield
        else:
            self.optimizer.override_loss_scale(1 / factor)
            try:
                yield
            finally:
                self.optimizer.custom_loss_scaler = False

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that DeepSpeed's optimizer holds beside the caller's optimizer: masters, gradients, buffers."""
        yield from _tensors_in(vars(self.optimizer))

    def remove(self) -> None:
        """Take the engine's hooks off the module. The module keeps its parameters as they are."""
        self.module_forward_pre_hook.remove()
        self.module_forward_post_hook.remove()
        if self.order is not None:
            self.order.remove()
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
