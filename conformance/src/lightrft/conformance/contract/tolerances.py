"""The parity tolerances: how closely weights must agree."""

from collections.abc import Mapping

import torch

from lightrft.conformance.clause import difference

ABSOLUTE = 1e-6
OTHER_SUMMATION_ORDER = 5e-5
"""Relative to the total update, between computations that add in different orders, such as on other numbers of ranks."""
BF16_RELATIVE = 0.1
BF16_FEW_UPDATES = 0.3
"""Adam's first updates are the learning rate times the sign of the gradient, which bf16 flips for small gradients."""

Weights = Mapping[str, torch.Tensor]


def bitwise(left: Weights, right: Weights) -> str | None:
    """The first tensor that differs in any bit, described; None if there is none."""
    for name, tensor in right.items():
        if name not in left:
            return f"{name} is missing"
        mismatch = difference(tensor.detach(), left[name], name)
        if mismatch is not None:
            return mismatch
    return None


def absolute(left: Weights, right: Weights, bound: float = ABSOLUTE) -> str | None:
    """The first tensor with an element that differs by more than ``bound``, described; None if there is none."""
    for name, tensor in right.items():
        if name not in left:
            return f"{name} is missing"
        if left[name].shape != tensor.shape:
            return f"{name}: expected the shape {tuple(tensor.shape)}, got {tuple(left[name].shape)}"
        worst = (left[name].double() - tensor.double()).abs().max().item()
        if not worst <= bound:
            return (
                f"{name} differs by {worst:.3g}, expected at most {bound:g}; {difference(tensor.detach(), left[name])}"
            )
    return None


def relative(left: Weights, right: Weights, start: Weights, bound: float) -> str | None:
    """Describe a difference larger than ``bound`` times the total update, both as 2-norms over the model, or return None."""
    difference = _norm({name: left[name].detach().double() - right[name].detach().double() for name in right})
    update = _norm({name: right[name].detach().double() - start[name].detach().double() for name in right})
    if not difference <= bound * update + 1e-12:
        return f"the weights differ by {difference / max(update, 1e-300):.3g} of the total update, expected at most {bound:g}"
    return None


def _norm(weights: Weights) -> float:
    return float(torch.stack([tensor.pow(2).sum() for tensor in weights.values()]).sum().sqrt())
