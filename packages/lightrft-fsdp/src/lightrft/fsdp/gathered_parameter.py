"""Keeps what FSDP2 loses when it gathers and reshards a parameter: `requires_grad` and gradient hooks.

FSDP2 keeps two objects for each parameter, the shard and the gathered parameter, and shows one at a time as the attribute
of the module. It copies ``requires_grad`` from the shard to the gathered parameter and never back, and it copies no hooks:
a change made while a module is gathered, after an evaluation for example, is lost. So are values written to a gathered
parameter; these are refused. It also reduces only the gradients that a rank has, and another rank may have different
ones.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from typing_extensions import override

from lightrft.config import StrategyError
from lightrft.strategy.backend import attributes_of, set_attributes

_NOTHING = nullcontext()


class GatheredParameter(FSDPParam):
    """An `FSDPParam` whose two parameters share ``requires_grad`` and gradient hooks, whichever one changes."""

    _requires_grad: bool | None = None
    """The last value on which both agreed; None until the first gathering."""
    _version: int
    """The version counter of the gathered parameter when it was gathered. Gathering keeps it, and writing raises it."""

    @override
    def to_unsharded(self) -> None:
        if self._requires_grad is None:
            self._requires_grad = self.sharded_param.requires_grad
            self._unsharded_param.requires_grad_(self._requires_grad)
            set_attributes(self._unsharded_param, attributes_of(self.sharded_param))
        self.synchronize()
        self.check_hooks()
        super().to_unsharded()
        self._version = self._unsharded_param._version

    @override
    def to_sharded(self) -> None:
        self.synchronize()
        self.check_unwritten()
        super().to_sharded()

    def synchronize(self) -> None:
        """Copy what was set on one of the two parameters since the last call to the other."""
        shard, gathered = self.sharded_param, self._unsharded_param
        requires_grad = shard.requires_grad
        if requires_grad is gathered.requires_grad:
            self._requires_grad = requires_grad
        else:
            self._requires_grad = not self._requires_grad
            for parameter in (shard, gathered):
                parameter.requires_grad_(self._requires_grad)
        if shard._backward_hooks is not gathered._backward_hooks:
            hooks = _merged(shard._backward_hooks, gathered._backward_hooks)
            shard._backward_hooks = gathered._backward_hooks = hooks

    def check_hooks(self) -> None:
        """Raise `StrategyError` for a hook that was registered after preparing, and that would never be called."""
        if self.sharded_param._post_accumulate_grad_hooks or self._unsharded_param._post_accumulate_grad_hooks:
            raise StrategyError(
                f"forward: expected no parameter with a hook of register_post_accumulate_grad_hook, got one on "
                f"{self._param_fqn}. FSDP2 does not accumulate whole gradients on the parameter. Use register_hook"
            )

    def check_unwritten(self) -> None:
        """Raise `StrategyError` if a script has written to the gathered parameter: the next gathering would undo it."""
        if self._unsharded_param._version != self._version:
            self._version = self._unsharded_param._version
            raise StrategyError(
                f"expected no values to be written to {self._param_fqn} since the last forward pass, for which FSDP2 gathered "
                f"it, got some, which are lost. Write weights with strategy.load_model, or write to the shards: after "
                f"optimizer_step and before the next forward pass, the parameters of the model are DTensors"
            )


class PartHook:
    """A forward pre-hook that a module has only while its parameters are sharded, so that a step does not run it."""

    def __init__(self, part: nn.Module, hook: Callable[[nn.Module, Any], None]) -> None:
        self._key = part.register_forward_pre_hook(hook, prepend=True).id
        self._hooks: Any = part._forward_pre_hooks  # an OrderedDict, which torch annotates as a dict
        self._hook = hook

    def add(self) -> None:
        """Add the hook again. Each resharding does this for each part: without a new handle, which takes longer."""
        self._hooks[self._key] = self._hook
        self._hooks.move_to_end(self._key, last=False)

    def remove(self) -> None:
        """Remove the hook, if the module has it."""
        self._hooks.pop(self._key, None)


class GatheredGroup(FSDPParamGroup):
    """An `FSDPParamGroup` of `GatheredParameter`."""

    part_hooks: Sequence[PartHook] = ()
    """The modules have them while the group is sharded."""

    @override
    def wait_for_unshard(self) -> None:
        with _outside_inference_mode():  # the gathered parameters are kept, and used in training later
            super().wait_for_unshard()

    @override
    def _to_sharded(self) -> None:
        super()._to_sharded()  # type: ignore[no-untyped-call]
        self._add_part_hooks()

    @override
    def _to_sharded_post_forward(self) -> None:
        super()._to_sharded_post_forward()  # type: ignore[no-untyped-call]
        self._add_part_hooks()

    @override
    def _to_unsharded(self) -> None:
        super()._to_unsharded()  # type: ignore[no-untyped-call]
        self.remove_part_hooks()

    def _add_part_hooks(self) -> None:
        for hook in self.part_hooks:
            hook.add()

    def remove_part_hooks(self) -> None:
        """Remove the hooks from all parts, until the group is sharded again."""
        for hook in self.part_hooks:
            hook.remove()

    @override
    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_unsharded:  # so nothing is gathered now
            for parameter in self.fsdp_params:
                parameter.synchronize()  # type: ignore[attr-defined]
                parameter.check_hooks()  # type: ignore[attr-defined]
                parameter.check_unwritten()  # type: ignore[attr-defined]
        return super().pre_forward(module, args, kwargs)

    @override
    def post_backward(self, *unused: Any) -> None:
        self.complete_gradients()
        super().post_backward(*unused)

    def complete_gradients(self) -> None:
        """Zero the missing gradients, if any is present: all ranks must reduce buffers of the same size.

        A group without any is not reduced, so this adds no collective. `FSDPModule.set_reduce_scatter_unused_params`, which
        torch 2.11 and 2.12 lack, also reduces groups that were not used in this backward pass.
        """
        gathered = [item._unsharded_param for item in self.fsdp_params if hasattr(item, "_unsharded_param")]
        if any(parameter.grad is not None for parameter in gathered):
            for parameter in gathered:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @override
    def _init_mp_dtypes(self) -> None:
        super()._init_mp_dtypes()
        if self._orig_dtype is None:  # all are frozen, now; they may not be later
            dtypes = {(parameter.orig_dtype, parameter.reduce_dtype) for parameter in self.fsdp_params}
            if len(dtypes) == 1:
                ((self._orig_dtype, self._reduce_dtype),) = dtypes


def parameter_groups(module: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's groups of parameters of ``module``: one for each part that is sharded."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            yield from _groups_of(part._get_fsdp_state())


def groups_of_prepared(model: nn.Module) -> Iterator[Any]:
    """Yield the `parameter_groups` of a model that was prepared, without a walk through its modules: `gather_for_parts` made the list."""
    assert isinstance(model, FSDPModule)
    for state in model._get_fsdp_state()._state_ctx.all_states:
        yield from _groups_of(state)


def _groups_of(state: Any) -> Iterator[Any]:
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.11 has one at most
    yield from (group for group in groups if group is not None)


def keep_changes(module: nn.Module) -> None:
    """Make the parameters of ``module``, sharded by FSDP2 just now, keep ``requires_grad`` and hooks."""
    for group in parameter_groups(module):
        group.__class__ = GatheredGroup
        for parameter in group.fsdp_params:
            parameter.__class__ = GatheredParameter


def gather_for_parts(module: nn.Module) -> None:
    """Gather parameters for parts that are called outside the forward pass that gathers them, without gradients.

    ``generate`` of a PEFT model, for example, calls the model inside it. With gradients this raises `StrategyError`: FSDP2
    reduces what was used in the forward pass of the module that it shards, the root or a layer.
    `stop_gathering_for_parts` undoes this.
    """
    assert isinstance(module, FSDPModule)
    state: Any = module._get_fsdp_state()
    state._lazy_init()  # or a part that is called first would become the root
    class_name = type(module).__name__.removeprefix("FSDP")
    names = {part: name for name, part in module.named_modules() if part is not module}
    for sharded in module.modules():
        if isinstance(sharded, FSDPModule):
            for group in _groups_of(sharded._get_fsdp_state()):
                group.part_hooks = [
                    PartHook(part, _gather_or_refuse(sharded, names[part], class_name))
                    for part in _users(group) - {sharded}
                ]


def stop_gathering_for_parts(module: nn.Module) -> None:
    """Undo `gather_for_parts`."""
    for group in parameter_groups(module):
        group.remove_part_hooks()
        group.part_hooks = ()


def _gather_or_refuse(sharded: FSDPModule, name: str, class_name: str) -> Callable[[nn.Module, Any], None]:
    """Return a forward pre-hook for the part ``name``, whose parameters ``sharded`` gathers."""

    def before(part: nn.Module, _: object) -> None:
        if torch.is_grad_enabled():
            raise StrategyError(
                f"forward: expected {name} to be called in the forward pass of {class_name}, got a call outside "
                f"it, for which FSDP2 does not gather its parameters. Call the model that prepare returned, and compute in "
                f"its forward what needs its parts"
            )
        sharded.unshard()

    return before


def _users(group: Any) -> set[nn.Module]:
    """Return the modules whose forward uses parameters of ``group``; several share a tied one."""
    infos = [parameter._module_info for parameter in group.fsdp_params]
    return {user for info in infos for user in (info.module, *info.shared_modules)}


def _outside_inference_mode() -> AbstractContextManager[object]:
    """Return a context without inference mode. To leave a mode that is not active takes longer than to ask."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def _merged(first: Any, second: Any) -> Any:
    """Return one of two dicts of hooks, either of which may be None, with the hooks of both."""
    if first is None or second is None:
        return second if first is None else first
    hooks: OrderedDict[int, Any] = first
    hooks.update(second)
    return hooks
