"""Sequence parallelism: ``sp_size`` consecutive ranks share the sequences of a batch.

Each rank holds a slice of every sequence, with all weights as its strategy shards them. In attention, all-to-alls exchange
slices for heads, as in DeepSpeed-Ulysses (`lightrft.strategy.parallel.attention`); everything else is computed token by token. `split` slices a batch,
`gather` reassembles per-token values, and the loss is that of whole sequences::

    local = strategy.sequence_parallel.split(batch)
    logits = model(**{name: local[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
    values = strategy.sequence_parallel.gather(per_token(logits, local["targets"]))  # (B, S)

Ranks that share sequences get the same samples, so batch sizes count groups of ranks, `data_ranks`. All ranks compute the same
loss; the mean over all ranks is then the mean over the groups.

In names of dimensions: N ranks, B sequences, S tokens of a sequence, L tokens of a slice: S / N, rounded up.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from lightrft.config import ArgumentError, ArgumentTypeError, ConfigError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.distributed.world import World, all_gather_objects
from lightrft.strategy.parallel import attention, exchange
from lightrft.strategy.parallel.model_checks import check_model

T = TypeVar("T")
IGNORED = -100
"""What ``labels`` are padded with: torch's losses ignore it."""


class SequenceParallel:
    """The ranks that share the sequences of this rank. With ``sp_size=1``, `split` and `gather` return their argument."""

    def __init__(self, world: World, operations: Operations, consensus: RankConsensus, size: int) -> None:
        """Make the group of this rank. All ranks must call this.

        Args:
            world: All ranks.
            operations: Names the calls in errors about ranks that died.
            consensus: Agreement between all ranks.
            size: Consecutive ranks that share a sequence.

        Raises:
            ConfigError: ``size`` does not divide the number of ranks.
        """
        if world.size % size:
            raise ConfigError(
                f"sp_size={size}: expected a divisor of the number of ranks, got {world.size} ranks. Choose a divisor of "
                f"{world.size}, or start a multiple of {size} ranks"
            )
        self.size, self.rank = size, world.rank % size
        self.data_ranks, self.data_rank = world.size // size, world.rank // size
        self._operations, self._consensus = operations, consensus
        self._first = world.rank - self.rank
        self.group: dist.ProcessGroup | None = None
        """The ranks that share a sequence, in the order of their slices; None with ``sp_size=1``."""
        if size > 1:
            ranks = list(range(self._first, self._first + size))
            self.group = world.device_group if size == world.size else world.new_group(ranks)
        self._splits: list[_Split] = []
        """The batches whose slices exist, and the last one; in the order in which they were split or used."""

    def release_group(self) -> None:
        """Drop the reference to the process group."""
        self.group = None

    # Batches

    def split(self, batch: Mapping[str, T]) -> dict[str, T]:
        """Return this rank's slice of a batch that all ranks of the group have. All ranks must call this.

        Every tensor (B, S) or (B, S, ...) is padded on the right to a multiple of the ranks, and sliced; other values are
        returned as they are. A slice does not contain its neighbours: shift targets before. With ``sp_size=1``, returns
        ``batch``.

        Three names are special. ``input_ids`` (or ``inputs_embeds``) defines B and S. ``attention_mask`` (B, S), all ones by
        default, stays whole, and is padded with zeros. ``position_ids`` (B or 1, S) are added if they are missing. As
        in transformers, position ids that restart mean packed sequences if there is no attention mask; the mask that is
        returned then has the number of each sequence, from 1 on.

        Args:
            batch: Tensors by name.

        Returns:
            A new dict. Pass ``input_ids``, ``attention_mask`` and ``position_ids`` of it to the model together.

        Raises:
            ArgumentError, ArgumentTypeError: On every rank, if a shape is wrong.
            StrategyError: On every rank, if the ranks of a group have different batches.
        """
        if self.size == 1:
            return batch  # type: ignore[return-value]
        self._require_open("sequence_parallel.split")
        own: dict[str, str] = {}
        with (
            self._operations.running("sequence_parallel.split"),
            self._consensus.together("sequence_parallel.split", report=lambda: own) as batches,
        ):
            inputs = _check_batch(batch)
            own.update(_described(batch))
        self.require_same("sequence_parallel.split", batches)
        return self._slices(batch, inputs)

    def require_same(self, call: str, reports: Sequence[Mapping[str, object]]) -> None:
        """Raise `StrategyError` unless the ranks of each group report the same. The message has what differs.

        Args:
            call: The call to name.
            reports: What each rank was given, by name of the argument.
        """
        for first in range(0, len(reports) if self.size > 1 else 0, self.size):
            group = reports[first : first + self.size]
            all_names = dict.fromkeys(name for each in group for name in each)
            names = [name for name in all_names if len({each.get(name) for each in group}) > 1]
            if names:
                given = "; ".join(
                    f"rank {first + index}: {', '.join(f'{name} {each.get(name)}' for name in names[:3])}"
                    for index, each in enumerate(group)
                )
                raise StrategyError(
                    f"{call}: expected the same arguments on the {self.size} ranks that share their sequences, got {given}. "
                    f"Take batches from strategy.setup_dataloader, which gives these ranks the same samples"
                )

    def _slices(self, batch: Mapping[str, Any], inputs: torch.Tensor) -> dict[str, Any]:
        length = inputs.shape[1]
        width = -(-length // self.size)
        local: dict[str, Any] = {}
        whole_mask_BS = _whole_mask(batch, inputs)
        positions_BS = batch.get("position_ids")
        if positions_BS is None:
            positions_BS = torch.arange(length, device=inputs.device).expand(len(inputs), -1)
        for name, value in {**batch, "position_ids": positions_BS.expand(len(inputs), -1)}.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == inputs.shape[:2]:
                local[name] = self._slice(value, width, IGNORED if name == "labels" else 0)
            else:
                local[name] = value
        local["attention_mask"] = pad(whole_mask_BS, (0, self.size * width - length))
        name_of_inputs = "inputs_embeds" if batch.get("input_ids") is None else "input_ids"
        newest = _Split(len(inputs), width, length, ref(local[name_of_inputs]))
        self._splits = [*(split for split in self._splits if split.inputs() is not None), newest]
        return local

    def _slice(self, tensor: torch.Tensor, width: int, filler: int) -> torch.Tensor:
        missing = self.size * width - tensor.shape[1]
        padded = pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=filler) if missing else tensor
        return padded[:, self.rank * width : (self.rank + 1) * width].clone()

    def use_split(self, inputs: torch.Tensor) -> bool:
        """Return whether the ``inputs`` of a model share memory with those that `split` returned; `gather` then applies to them."""
        memory = inputs.untyped_storage().data_ptr()
        for index, split in enumerate(self._splits):
            known = split.inputs()
            if known is not None and known.untyped_storage().data_ptr() == memory:
                self._splits.append(self._splits.pop(index))
                return True
        return False

    def gather(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """Return per-token values of whole sequences, in order and without padding. All ranks of the group must call this.

        The gradient of a slice is the sum of the ranks' gradients of it. All of them compute the same loss, so this sum is
        ``sp_size`` times the gradient, and the mean over all ranks makes it the gradient again.

        Args:
            tensor: (B, L) or (B, L, ...): values of the tokens of a slice.
            length: S. Default: that of the batch with these B and L on which a prepared model was called last, or that was
                split last. Give it to gather values of an earlier batch.

        Returns:
            (B, S) or (B, S, ...), the same on all ranks of the group. With ``sp_size=1``, ``tensor``.

        Raises:
            ArgumentError, ArgumentTypeError: The shape is not that of a slice.
        """
        if self.size == 1:
            return tensor
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(
                f"sequence_parallel.gather: expected a tensor (B, L) or (B, L, ...), got {shown(tensor)}"
            )
        lengths = [split.length for split in self._splits if (split.rows, split.width) == tuple(tensor.shape[:2])]
        if length is None and lengths:
            length = lengths[-1]
        if length is None or -(-length // self.size) != tensor.shape[1]:
            known = ", ".join(sorted({f"({split.rows}, {split.width}) of {split.length}" for split in self._splits}))
            raise ArgumentError(
                f"sequence_parallel.gather: expected a value for each token of a slice, (B, L) of one of these batches: "
                f"{known or 'none'}, got shape {tuple(tensor.shape)}{'' if length is None else f' and length={length}'}. Keep as "
                f"many tokens as split returned"
            )
        with self._operations.running("sequence_parallel.gather"):
            return exchange.gather(tensor, length, self._require_open("sequence_parallel.gather"))

    def _require_open(self, call: str) -> dist.ProcessGroup:
        if self.group is None:
            raise StrategyError(
                f"{call}: expected an open strategy, got one that was closed. Call setup_distributed, and use "
                f"strategy.sequence_parallel of the open one"
            )
        return self.group

    # Prompts

    def prompts_to_complete(self, prompts: Sequence[T], reports: Sequence[object]) -> list[T] | None:
        """Return the prompts that this rank completes for its group, or None if it completes its own.

        Args:
            prompts: This rank's prompts.
            reports: A list with a checksum of the prompts of each rank, or with None. The ranks of a group share their
                prompts if the checksums are equal.
        """
        mine = reports[self._first : self._first + self.size]
        shared = self.size > 1 and mine[0] != [None] and all(other == mine[0] for other in mine)
        return list(prompts[self.rank :: self.size]) if shared else None

    def gather_completions(self, completions: Sequence[T], prompts: int, each: int) -> list[T]:
        """Return the completions of all prompts of the group, in order. All ranks of the group must call this.

        Args:
            completions: Those of `prompts_to_complete` of this rank, with ``each`` adjacent ones for a prompt.
            prompts: The number of prompts of the group.
            each: The number of completions of a prompt.
        """
        parts = self.all_gather(list(completions), "gather_and_generate")
        places = ((index % self.size, index // self.size * each) for index in range(prompts))
        return [completion for rank, start in places for completion in parts[rank][start : start + each]]

    def all_gather(self, items: list[T], call: str) -> list[list[T]]:
        """Return the items of each rank of the group, which pickle can copy, for ``call``. All of them must call this."""
        group = self._require_open(call)
        with self._operations.running(call):
            return all_gather_objects(items, group)

    # Models and losses

    def check_model(self, module: nn.Module) -> None:
        """Raise `UnsupportedOperationError` unless the ranks of a group can share the attention of ``module``."""
        if self.size > 1:
            check_model(module, self.size)

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """Let a prepared model take batches that are split; return a function that undoes this."""
        return attention.attach(module, self.group, self.use_split) if self.group is not None else lambda: None

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context in which a prepared model computes."""
        return attention.forget_layout() if self.size > 1 else nullcontext()

    def check_loss(self, loss: torch.Tensor) -> None:
        """Raise `StrategyError` if ``loss`` was computed from a slice that was not gathered."""
        if self.size > 1:
            exchange.check_gathered(loss)


class _Split:
    """A batch that was split."""

    def __init__(self, rows: int, width: int, length: int, inputs: "ref[torch.Tensor]") -> None:
        self.rows, self.width, self.length, self.inputs = rows, width, length, inputs


class SequenceDataProcessor:
    """LightRFT's ``sp_data_processor``: lists whose items the ranks of a group hold in parts.

    For scripts that give each rank different samples. Ranks that share sequences compute on all of them: `preprocess` collects
    the samples before the models run, and `postprocess` keeps this rank's part of the results.
    """

    def __init__(self, ranks: SequenceParallel) -> None:
        self._ranks = ranks

    def preprocess(self, data: Sequence[T]) -> Sequence[T]:
        """Return the items of all ranks of the group, in rank order. All ranks of the group must call this.

        Args:
            data: This rank's items, which pickle can copy. With ``sp_size=1`` it is returned unchanged.
        """
        if self._ranks.size == 1:
            return data
        return [item for part in self._ranks.all_gather(list(data), "sp_data_processor.preprocess") for item in part]

    def postprocess(self, data: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of the items that all ranks of the group have. Any rank may call this.

        Args:
            data: As many items for each rank. With ``sp_size=1`` it is returned unchanged.

        Raises:
            ArgumentError: The number of items does not divide by the ranks.
        """
        if self._ranks.size == 1:
            return data
        if len(data) % self._ranks.size:
            raise ArgumentError(
                f"sp_data_processor.postprocess: expected a number of items that is a multiple of sp_size={self._ranks.size}, got "
                f"{len(data)}. Pass one result for each item that preprocess returned"
            )
        share = len(data) // self._ranks.size
        return data[self._ranks.rank * share : (self._ranks.rank + 1) * share]


def _check_batch(batch: object) -> torch.Tensor:
    """Return the inputs of ``batch``. Raise `ArgumentError` or `ArgumentTypeError` if something does not fit them."""
    if not isinstance(batch, Mapping):
        raise ArgumentTypeError(f"sequence_parallel.split: expected a dict of tensors, got {shown(batch)}")
    inputs = batch.get("input_ids")
    inputs = batch.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(inputs, torch.Tensor) or inputs.ndim < 2 or 0 in inputs.shape:
        got = (
            f"shape {tuple(inputs.shape)}"
            if isinstance(inputs, torch.Tensor)
            else f"the names {sorted(map(str, batch))}"
        )
        raise ArgumentError(
            f"sequence_parallel.split: expected input_ids of shape (B, S), or inputs_embeds (B, S, H), got {got}. Pass at "
            f"least one token"
        )
    shapes = {
        "attention_mask": {tuple(inputs.shape[:2])},
        "position_ids": {tuple(inputs.shape[:2]), (1, inputs.shape[1])},
    }
    for name, expected in shapes.items():
        value = batch.get(name)
        if value is not None and not (isinstance(value, torch.Tensor) and tuple(value.shape) in expected):
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
            raise ArgumentError(
                f"sequence_parallel.split: expected {name} of shape {tuple(inputs.shape[:2])}, that of the inputs, got {got}"
            )
    return inputs


def _described(batch: Mapping[str, object]) -> dict[str, str]:
    """Return the shape of each tensor, with a checksum of those that ranks do not round differently."""
    described = {}
    for name, value in batch.items():
        if (
            isinstance(name, str)
            and isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and not value.is_meta
        ):
            exact = not (value.is_floating_point() or value.is_complex())
            if name in ("attention_mask", "position_ids"):
                value, exact = (value != 0) if name == "attention_mask" else value.long(), True
            digest = (
                hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:8] if exact else ""
            )
            described[name] = f"{list(value.shape)}{f' ({digest})' if digest else ''}"
    return described


def _whole_mask(batch: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Return the attention mask (B, S) of the batch, in which packed sequences are numbered from 1."""
    given, positions_BS = batch.get("attention_mask"), batch.get("position_ids")
    if given is not None:
        return given if given.dtype is torch.bool else (given != 0).long()
    if positions_BS is None:
        return torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    starts_BS = pad(positions_BS.diff(dim=1) != 1, (1, 0))
    return 1 + starts_BS.long().cumsum(dim=1).expand(len(inputs), -1)
