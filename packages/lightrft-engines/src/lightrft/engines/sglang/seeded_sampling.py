"""Draws that depend only on a seed and a position, for SGLang's sampler. Pure.

Shapes: B sequences of a batch, V vocabulary.
"""

import torch

_GOLDEN = -7046029254386353131
_MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""Constants of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), as signed numbers."""


def draw(probs_BV: torch.Tensor, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """One token for each row, by inverse CDF at the number that `uniform` gives. Returns (B,) int32."""
    cumulative_BV = probs_BV.double().cumsum(dim=-1)
    marks_B1 = uniform(seeds_B, positions_B)[:, None] * cumulative_BV[:, -1:]
    drawn_B1 = torch.searchsorted(cumulative_BV, marks_B1, right=True).clamp_(max=probs_BV.shape[-1] - 1)
    return drawn_B1.squeeze(1).to(torch.int32)


def uniform(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each seed and position, by SplitMix64. Returns (B,) float64."""
    mixed_B = seeds_B + (positions_B.to(torch.int64) + 1) * _GOLDEN
    for shift, factor in _MIXERS:
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * factor
    mixed_B = mixed_B ^ _shifted(mixed_B, 31)
    return _shifted(mixed_B, 11).double() / 2**53


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's shift keeps the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def filtered(
    probs_BV: torch.Tensor, top_ks_B: torch.Tensor, top_ps_B: torch.Tensor, min_ps_B: torch.Tensor
) -> torch.Tensor:
    """``probs_BV`` with zeros where top-k, top-p or min-p exclude a token; not renormalised."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    ranks_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
    kept_BV = (ranks_V < top_ks_B[:, None]) & (before_BV < top_ps_B[:, None] * sorted_BV.sum(dim=-1, keepdim=True))
    kept_BV &= sorted_BV >= sorted_BV[:, :1] * min_ps_B[:, None]
    return probs_BV.where(torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV), 0.0)
