"""Attention over sequences that several ranks share (Ulysses), for models of transformers.

Two functions are registered with transformers under one `NAME`: an attention function, and the function that makes its
masks. A prepared model uses both; no file of a model is patched. The registration stays in the process: it has no effect on
a model that does not name it, and copies of a prepared model's configuration may outlive the strategy.

A batch of `SequenceParallel.split` shows by itself that it is split: its attention mask covers the whole sequence, and its
tokens are a slice. A hook on the model reads the mask as a `Layout`, from which `mask` makes masks of the whole sequence.
`attention` recognises these by their shape, also in gradient checkpointing, which calls it again in the backward pass. A
batch that is not split, one that generates for example, takes transformers' own path.

In names of dimensions: N ranks, B sequences, S tokens of a padded sequence, L = S / N tokens of a slice, H heads, D head
size.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from lightrft.config import StrategyError
from lightrft.strategy.parallel.exchange import all_to_all, mark_slices
from lightrft.strategy.patching import Target, require

NAME = "lightrft_sequence_parallel"
VERSIONS = ">=5.10,<6"
_MASK_PARAMETERS = ("q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")
TARGETS = (
    Target(target="transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"),
    Target(target="transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS"),
    Target(target="transformers.masking_utils:sdpa_mask", parameters=_MASK_PARAMETERS),
    Target(target="transformers.masking_utils:and_masks"),
    Target(target="transformers.masking_utils:packed_sequence_mask_function"),
    Target(
        target="transformers.integrations.sdpa_attention:sdpa_attention_forward",
        parameters=("module", "attention_mask", "scaling", "dropout", "is_causal"),
    ),
)
"""What this module uses of transformers."""
_NOT_SPLIT = ("s_aux", "softcap", "position_bias")
"""Arguments of attention functions that change its result, and that `attention` does not know."""


@dataclass(kw_only=True)
class Layout:
    """The sequences of a batch that is split."""

    length: int
    """S."""
    padding: torch.Tensor | None
    """(B, S), whether a token is not padding; None if only the last N - 1 tokens or fewer are, which no causal token sees."""
    valid: torch.Tensor
    """(B, S), whether a token is not padding."""
    segments: torch.Tensor | None
    """(B, S), for packed sequences, the number of the sequence to which a token belongs."""
    calls: int = 0
    """How often attention was computed over the whole sequence."""

    @classmethod
    def of(cls, attention_mask_BS: torch.Tensor, ranks: int) -> "Layout":
        """Read the mask of `SequenceParallel.split`: 0 is padding, and packed sequences are numbered from 1."""
        length = attention_mask_BS.shape[1]
        valid_BS = attention_mask_BS != 0
        in_all, in_any = valid_BS.all(0), valid_BS.any(0)
        only_tail = (in_all == in_any).all() & in_all[: length - ranks + 1].all() & ~(in_all[1:] & ~in_all[:-1]).any()
        is_only_tail, is_packed = torch.stack(
            [only_tail, (attention_mask_BS > 1).any()]
        ).tolist()  # one wait for the device
        return cls(
            length=length,
            padding=None if is_only_tail else valid_BS,
            valid=valid_BS,
            segments=attention_mask_BS if is_packed else None,
        )


_layout: ContextVar[Layout | None] = ContextVar("lightrft_sequence_layout", default=None)
"""The layout of the forward pass in progress; None if its batch is not split."""
_groups: WeakKeyDictionary[nn.Module, dist.ProcessGroup] = WeakKeyDictionary()
"""The ranks that share the sequences of a module of a prepared model."""


@contextmanager
def forget_layout() -> Iterator[None]:
    """Run a forward pass of a prepared model in the body, without the layout of another one that was interrupted."""
    token = _layout.set(None)
    try:
        yield
    finally:
        _layout.reset(token)


def transformers_models(module: nn.Module) -> Iterator[nn.Module]:
    """Yield every model of transformers in ``module``, itself included, outer ones first."""
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        yield from (part for part in module.modules() if isinstance(part, transformers.PreTrainedModel))


def register() -> None:
    """Register `attention` and `mask` with transformers. Idempotent.

    Raises:
        StrategyError: The installed transformers lacks one of `TARGETS`.
    """
    require("sp_size", "transformers", VERSIONS, TARGETS)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def attach(
    module: nn.Module, group: dist.ProcessGroup, use_split: Callable[[torch.Tensor], bool]
) -> Callable[[], None]:
    """Let the models of transformers in ``module`` take batches that are split over ``group``.

    Args:
        module: A model that `check_model` accepts, wrapped by the backend.
        group: The ranks that share a sequence.
        use_split: Called with the inputs of each forward pass; returns whether they come from `SequenceParallel.split`.

    Returns:
        A function that undoes this.
    """
    register()
    undo: list[Callable[[], None]] = []
    for part in module.modules():
        _groups[part] = group
    for model in transformers_models(module):
        switched: Any = model
        before = switched.config._attn_implementation
        if before != NAME:  # models may share a configuration
            switched.set_attn_implementation(NAME)
            undo.append(partial(setattr, switched.config, "_attn_implementation", before))
        undo.extend(_hook(model, dist.get_world_size(group), use_split))

    def detach() -> None:
        for step in undo:
            step()
        for part in module.modules():
            _groups.pop(part, None)

    return detach


# The forward pass of a model


def _hook(model: nn.Module, ranks: int, use_split: Callable[[torch.Tensor], bool]) -> list[Callable[[], None]]:
    """Read the layout of every batch on which ``model`` is called."""
    signature = inspect.signature(type(model).forward)
    tokens: list[Token[Layout | None]] = []

    def before(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens.clear()  # left by a call that was interrupted: no hook runs then
        arguments = signature.bind_partial(model, *args).arguments | kwargs if args else kwargs
        layout = _layout_of(arguments, ranks, use_split)
        tokens.append(_layout.set(layout))
        if layout is not None and "use_cache" in signature.parameters and "use_cache" not in arguments:
            kwargs = {**kwargs, "use_cache": False}  # a cache would copy every key and value
        return args, kwargs

    def after(model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        layout = _layout.get()
        if not tokens:  # `before` raised
            return
        _layout.reset(tokens.pop())
        if layout is None or output is None or sys.exc_info()[0] is not None:
            return
        if isinstance(output, Mapping):
            mark_slices(output)
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
        if layout.calls < layers:
            raise StrategyError(
                f"forward: expected each of the {layers} layers of {type(model).__name__} to run sequence-parallel over "
                f"{ranks} ranks, got {layout.calls}; the others attended to this rank's slice only. Use sp_size=1"
            )

    return [
        model.register_forward_pre_hook(before, with_kwargs=True).remove,
        model.register_forward_hook(after, always_call=True).remove,
    ]


def _layout_of(arguments: Mapping[str, Any], ranks: int, use_split: Callable[[torch.Tensor], bool]) -> Layout | None:
    """Return the layout of a batch that is split; None for one that is not.

    Raises:
        StrategyError: The batch is a slice, but lacks what belongs to it.
    """
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(inputs, torch.Tensor) or arguments.get("past_key_values") is not None:
        return None
    is_slice, attention_mask = use_split(inputs), arguments.get("attention_mask")
    full_shape = (inputs.shape[0], inputs.shape[1] * ranks)
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) != full_shape:
        if is_slice:
            got = f"shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, torch.Tensor) else "none"
            raise StrategyError(
                f"forward: expected the attention mask that split returned, of shape {full_shape}, with a slice of the sequence, got "
                f"{got}. Pass input_ids, attention_mask and position_ids of split together"
            )
        return None
    if arguments.get("position_ids") is None:
        raise StrategyError(
            "forward: expected the position_ids that split returned with a slice of the sequence, got none. Pass input_ids, "
            "attention_mask and position_ids of split together"
        )
    for name, remedy in (
        (
            "labels",
            "Compute per-token values from the outputs, and the loss from strategy.sequence_parallel.gather(values)",
        ),
        ("output_router_logits", "Set router_aux_loss_coef to 0 and leave it out"),
        ("output_attentions", "Leave it out, or use sp_size=1"),
    ):
        if arguments.get(name) is not None and arguments[name] is not False:
            raise StrategyError(f"forward: expected no {name} with a slice of the sequence, got one. {remedy}")
    return _layout.get() or Layout.of(attention_mask, ranks)


# What transformers calls


def mask(**arguments: Any) -> torch.Tensor | None:
    """Return the mask of one kind of layers (full, or with a window), as transformers' `sdpa_mask` does.

    For a batch that is split, it covers the whole sequence: (B or 1, 1, S, S), or (1, 1, 0, S) if a causal mask suffices.
    """
    from transformers.masking_utils import and_masks, packed_sequence_mask_function, sdpa_mask

    layout = _layout.get()
    if layout is None:
        unsplit: torch.Tensor | None = sdpa_mask(**arguments)
        return unsplit
    if arguments.get("use_vmap"):
        raise StrategyError(
            "forward: expected causal or windowed attention, got a model that changes its mask by its own function, "
            "which would see a slice of the sequence. Use sp_size=1"
        )
    causal_skip = arguments.get("allow_is_causal_skip", True)
    full_arguments = {
        **arguments, "q_length": layout.length, "kv_length": layout.length, "q_offset": 0, "kv_offset": 0,
        "attention_mask": layout.padding if causal_skip else layout.valid,
    }  # fmt: skip
    if layout.segments is not None:
        same_segment = packed_sequence_mask_function(layout.segments)
        full_arguments["mask_function"] = and_masks(arguments["mask_function"], same_segment)
        full_arguments["allow_is_causal_skip"] = full_arguments["allow_is_bidirectional_skip"] = False
    elif full_arguments["attention_mask"] is None:
        full_arguments["batch_size"] = 1
    result: torch.Tensor | None = sdpa_mask(**full_arguments)
    return (
        torch.empty(1, 1, 0, layout.length, dtype=torch.bool, device=arguments.get("device"))
        if result is None
        else result
    )


@dataclass(frozen=True)
class _Heads:
    """What `sdpa_attention_forward` reads of an attention layer."""

    num_key_value_groups: int
    is_causal: bool


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **arguments: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return the attention of this rank's slice to the whole sequence, as transformers' `sdpa_attention_forward` does.

    Args:
        module: The attention layer.
        query: (B, H, L, D).
        key: (B, KV heads, L, D).
        value: The same.
        attention_mask: What `mask` returned.
        **arguments: ``scaling``, ``dropout`` and what else transformers passes.

    Returns:
        (B, L, H, D), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout, group = _layout.get(), _groups.get(module)
    ranks = 1 if group is None else dist.get_world_size(group)
    length = ranks * query.shape[2]
    if group is None or attention_mask is None or attention_mask.shape[-2:] not in ((0, length), (length, length)):
        if layout is not None:
            raise StrategyError(
                f"forward: expected {type(module).__name__} to get the mask of the whole sequence, got "
                f"{'none' if attention_mask is None else tuple(attention_mask.shape)}: its model does not make its masks with "
                f"transformers' functions. Use sp_size=1"
            )
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **arguments
        )
        return plain
    unknown = [name for name in _NOT_SPLIT if arguments.get(name) is not None]
    if unknown:
        raise StrategyError(
            f"forward: expected plain attention in {type(module).__name__}, got {', '.join(unknown)}, which cannot be shared "
            f"over ranks. Use sp_size=1"
        )
    if layout is not None:
        layout.calls += 1
    heads = query.shape[1]
    query, key, value = all_to_all(divisible_heads(query, key, value, ranks), scatter=1, gather=2, group=group)
    part = _Heads(query.shape[1] // key.shape[1], getattr(module, "is_causal", True))
    whole_mask = None if attention_mask.shape[-2] == 0 else attention_mask
    output, _ = sdpa_attention_forward(part, query, key, value, whole_mask, **arguments)
    (slice_BLHD,) = all_to_all((output,), scatter=1, gather=2, group=group)
    return slice_BLHD[:, :, :heads], None  # without those that were added


def divisible_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeat key-value heads and add heads of zeros, so that ``ranks`` ranks get equal parts, each with whole groups.

    A group is a key-value head with the query heads that use it. Repeating key-value heads makes the groups smaller. The
    fewest repeats are chosen with which a rank computes the fewest query heads: 9 query heads of 3 key-value heads become 10
    of 10 for two ranks, 4 of 2 stay, and 4 of 1 become 4 of 2. The added heads are last.
    """
    groups = key.shape[1]
    size = query.shape[1] // groups

    def divided(repeats: int) -> int:
        """The number of groups, those of zeros included."""
        return ranks * math.ceil(groups * repeats / ranks)

    divisors = (number for number in range(1, size + 1) if size % number == 0)
    repeats = min(divisors, key=lambda number: divided(number) * size // number)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    added = divided(repeats) - groups * repeats
    if added:
        key, value = (pad(tensor, (0, 0, 0, 0, 0, added)) for tensor in (key, value))
        query = pad(query, (0, 0, 0, 0, 0, added * size // repeats))
    return query, key, value
