"""Operations on batches that several ranks share."""

from collections.abc import Mapping

import torch

from lightrft.conformance import sequences
from lightrft.conformance.interpreter.session import Session, operation


def _batch(session: Session, batch: int, form: str, length: int, data_of: int | None = None) -> sequences.Batch:
    """The batch of this rank's group, on the device."""
    rank = session.rank // session.strategy.sequence_parallel.size if data_of is None else data_of
    tensors = sequences.batch(batch, rank, form, length)
    return {name: tensor.to(session.strategy.device) for name, tensor in tensors.items()}


@operation
def sequence_backward(
    session: Session, model: str, batch: int, form: str, length: int = 13, gathered: bool = True,
    data_of: int | None = None, denominator: bool = False, denominator_of_slice: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Split, forward, gather and backward of one batch; the loss, and the log-probability of each token.

    ``gathered``: without it, the loss is that of the slice. ``data_of``: the rank whose batch to use.
    ``denominator``: pass the sum over tokens and their number, in place of the mean. ``denominator_of_slice``: pass the
    number of tokens of the slice.
    """
    entry, ranks = session.models[model], session.strategy.sequence_parallel
    full_batch = _batch(session, batch, form, length, data_of)
    local = ranks.split(full_batch)
    values = sequences.log_probs(entry.model, local)
    values, labels = (ranks.gather(values), full_batch["labels"]) if gathered else (values, local["labels"])
    loss, items = sequences.loss_of(values, labels), sequences.items_in(labels)
    if denominator:
        loss = loss * items
        items = sequences.items_in(local["labels"]) if denominator_of_slice else items
        session.strategy.backward(loss, entry.model, session.optimizer(model), denominator=items)
    else:
        session.strategy.backward(loss, entry.model, session.optimizer(model))
    return {"loss": float(loss), "log_probs": values.detach()}


@operation
def sequence_forward(
    session: Session, model: str, batch: int, form: str, length: int = 13, split: bool = True
) -> dict[str, torch.Tensor]:
    """The log-probabilities of one batch under no_grad; without ``split``, every rank computes all of them."""
    ranks, full_batch = session.strategy.sequence_parallel, _batch(session, batch, form, length)
    model_in_use = session.models[model].model
    with torch.no_grad():
        if not split:
            return {"log_probs": sequences.log_probs(model_in_use, full_batch)}
        return {"log_probs": ranks.gather(sequences.log_probs(model_in_use, ranks.split(full_batch)))}


@operation
def round_trip(
    session: Session, batch: int, form: str, length: int, drop: str | None = None, after_another: bool = False
) -> dict[str, object]:
    """Split a batch and gather it: its values, with some of other types and shapes.

    ``drop``: leave out a name. ``after_another``: first split, and hold, a batch whose slices are as long without padding.
    """
    ranks = session.strategy.sequence_parallel
    longest = -(-length // ranks.size) * ranks.size
    _held = ranks.split(_batch(session, batch + 1, "full", longest)) if after_another else None
    full_batch = _extended(_batch(session, batch, form, length))
    local = ranks.split({name: value for name, value in full_batch.items() if name != drop})
    names = [name for name in full_batch if name not in ("attention_mask", drop)]
    return {name: ranks.gather(local[name]) for name in names} | {"mask": _mask(local["attention_mask"], length)}


def _extended(batch: Mapping[str, torch.Tensor]) -> sequences.Batch:
    tokens_BS = batch["input_ids"]
    features_BSX = torch.stack([tokens_BS.float() / 3, -tokens_BS.float()], dim=-1)
    return {**batch, "advantages": tokens_BS.double() / 7, "chosen": tokens_BS > 5, "features": features_BSX}


def _mask(mask_BS: torch.Tensor, length: int) -> list[bool]:
    """Whether a token of the first row, with the padding of `split`, is not padding."""
    assert mask_BS.shape[1] >= length
    return [bool(value) for value in mask_BS[0] != 0]


@operation
def sequence_geometry(session: Session) -> dict[str, int]:
    """K, and the position of this rank among those that share a sequence."""
    ranks = session.strategy.sequence_parallel
    return {"accumulation_steps": session.strategy.accumulated_gradient, "size": ranks.size, "rank": ranks.rank}
