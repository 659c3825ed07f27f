"""Taking off a model what DeepSpeed hung on it, so that a model that outlives its strategy holds nothing of it.

What hangs there holds engines, master weights and process groups: threads and sockets.
"""

from torch import nn

from lightrft.config import StrategyError

SHARDED = "ds_id"
"""The attribute that stays on a parameter that was sharded: it is empty now, and must not be taken for whole."""

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


def strip(module: nn.Module) -> None:
    """Remove DeepSpeed's attributes and containers from ``module`` and its parameters."""
    for part in module.modules():
        _remove(part, _ON_MODULES)
        part._parameters = dict(part._parameters)  # ZeRO-3 puts a container of its own there
    for parameter in module.parameters():
        _remove(parameter, _ON_PARAMETERS)


def check_whole(module: nn.Module) -> None:
    """Raise `StrategyError` where ``module`` was sharded, and not by the strategy that asks."""
    if any(hasattr(parameter, SHARDED) for parameter in module.parameters()):
        raise StrategyError(
            f"prepare: the parameters of {type(module).__name__} are sharded already, by a strategy that was closed or by "
            f"deepspeed.zero.Init; build the model anew, in init_model_context"
        )


def _remove(holder: object, names: frozenset[str]) -> None:
    for name in list(vars(holder)):
        if (name in names or name.startswith("ds_")) and name != SHARDED:
            delattr(holder, name)
