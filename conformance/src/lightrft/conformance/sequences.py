"""Batches of sequences and their loss, for sequence parallelism: the same in the workers and in the reference."""

from collections.abc import Mapping

import torch
from torch import nn

from lightrft.conformance.language_models import VOCABULARY

FORMS = ("full", "left", "right", "packed", "cut")
"""No padding, padding on one side, two packed sequences, and two whose border is where two ranks would cut."""
IGNORED = -100
Batch = dict[str, torch.Tensor]


def batch(number: int, rank: int, form: str, length: int, rows: int = 2) -> Batch:
    """A micro-batch of one rank, or of the ranks that share it: inputs, and ``labels``, the next token of each token."""
    generator = torch.Generator().manual_seed(1_000_003 * number + rank)
    tokens_BS = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels_BS = nn.functional.pad(tokens_BS[:, 1:], (0, 1), value=IGNORED)
    if form in ("packed", "cut"):
        border = -(-length // 2) if form == "cut" else length // 3 + 1
        labels_BS[:, border - 1] = IGNORED
        positions_BS = torch.cat([torch.arange(border), torch.arange(length - border)]).repeat(rows, 1)
        return {"input_ids": tokens_BS, "position_ids": positions_BS, "labels": labels_BS}
    mask_BS = torch.ones(rows, length, dtype=torch.long)
    padded = {"full": slice(0), "left": slice(0, length // 3), "right": slice(length - length // 3, length)}[form]
    mask_BS[0, padded] = 0
    labels_BS[0, padded] = IGNORED
    if form == "right":
        labels_BS[0, length - length // 3 - 1] = IGNORED
    return {"input_ids": tokens_BS, "attention_mask": mask_BS, "labels": labels_BS}


def log_probs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of the label of each token, in fp32; 0 where there is none."""
    names = ("input_ids", "attention_mask", "position_ids")
    logits_BSV = model(**{name: batch[name] for name in names if name in batch}, use_cache=False).logits.float()
    labels_BS = batch["labels"]
    values_BS: torch.Tensor = logits_BSV.log_softmax(-1).gather(-1, labels_BS.clamp(min=0)[..., None])[..., 0]
    return values_BS.masked_fill(labels_BS == IGNORED, 0.0)


def items_in(labels_BS: torch.Tensor) -> torch.Tensor:
    """The number of tokens with a label."""
    return (labels_BS != IGNORED).sum()


def loss_of(log_probs_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens with a label."""
    return -log_probs_BS.sum() / items_in(labels_BS)
