"""Removing what DeepSpeed attached to a model, so that a model that outlives its strategy does not keep it alive.

The attached objects hold engines, master weights and process groups, and with them threads and sockets.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightrft.config import StrategyError

SHARDED = "ds_id"
"""Stays on a parameter that was sharded: it is empty now, and must not be mistaken for a full one."""

_ON_MODULES = frozenset(
    {
        "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params", "all_parameters",
        "_original_parameters",
    }
)  # fmt: skip
_ON_PARAMETERS = frozenset(
    {
        # ZeRO-3
        "all_gather", "all_gather_coalesced", "partition", "reduce_gradients_at_owner", "partition_gradients",
        "aligned_size", "padding_size", "partition_numel", "item", "convert_to_zero_parameters", "nvme_swapper",
        "is_external_param", "_z3_optimizer",
        # ZeRO-1 and 2
        "grad_accum", "param_idx_in_group", "_hp_mapping", "_hp_grad", "_dp_group", "_index_in_param_group",
        "_zero_optimizer", "get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad",
        "load_hp_checkpoint_state",
    }
)  # fmt: skip


def detach(module: nn.Module) -> None:
    """Remove DeepSpeed's attributes and containers from ``module`` and its parameters. May be called twice."""
    for submodule in module.modules():
        _delete_attributes(submodule, _ON_MODULES)
        # ZeRO-3 puts its own container there, which gathers a parameter that is read by name while a forward pass runs,
        # or after one that failed.
        submodule._parameters = dict(submodule._parameters.items())
    for parameter in module.parameters():
        _delete_attributes(parameter, _ON_PARAMETERS)


def check_not_sharded(module: nn.Module) -> None:
    """Raise `StrategyError` if ``module`` was sharded by another strategy."""
    if any(hasattr(parameter, SHARDED) for parameter in module.parameters()):
        raise StrategyError(
            f"prepare: expected full parameters, got a {type(module).__name__} that is sharded already, by a strategy that "
            f"was closed. Build the model again, in init_model_context"
        )


def without_deepspeeds(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a parameter that are not DeepSpeed's."""
    return {name: value for name, value in attributes.items() if not _is_deepspeeds(name, _ON_PARAMETERS)}


def _is_deepspeeds(name: str, names: frozenset[str]) -> bool:
    return name in names or name.startswith("ds_")


def _delete_attributes(holder: object, names: frozenset[str]) -> None:
    for name in list(vars(holder)):
        if _is_deepspeeds(name, names) and name != SHARDED:
            delattr(holder, name)
