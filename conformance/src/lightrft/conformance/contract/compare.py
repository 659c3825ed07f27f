"""How near is near enough: the parity table."""

from collections.abc import Mapping

import torch

from lightrft.conformance.clause import show

ABSOLUTE = 1e-6
ACROSS_FAMILIES = 5e-5
BF16_RELATIVE = 0.1
BF16_FEW_UPDATES = 0.3
"""Adam's first updates have the size of the rate and the gradient's sign, which bf16 turns for small gradients."""

Weights = Mapping[str, torch.Tensor]


def bitwise(left: Weights, right: Weights) -> str | None:
    """What differs in any bit, or None."""
    for name, tensor in right.items():
        if name not in left:
            return f"{name} is missing"
        if left[name].numpy().tobytes() != tensor.contiguous().numpy().tobytes():
            worst = (left[name].double() - tensor.double()).abs().max().item()
            return f"{name} differs by {worst:.3g}: {show(left[name])} against {show(tensor)}"
    return None


def absolute(left: Weights, right: Weights, bound: float = ABSOLUTE) -> str | None:
    """What differs by more than ``bound`` in any element, or None."""
    for name, tensor in right.items():
        if name not in left:
            return f"{name} is missing"
        worst = (left[name].double() - tensor.double()).abs().max().item()
        if not worst <= bound:
            return f"{name} differs by {worst:.3g}, more than {bound:g}"
    return None


def relative(left: Weights, right: Weights, start: Weights, bound: float) -> str | None:
    """Whether the difference is more than ``bound`` of the total update, both as 2-norms over the whole model."""
    difference = _norm({name: left[name].detach().double() - right[name].detach().double() for name in right})
    update = _norm({name: right[name].detach().double() - start[name].detach().double() for name in right})
    if not difference <= bound * update + 1e-12:
        return f"the weights differ by {difference / max(update, 1e-300):.3g} of the update, more than {bound:g}"
    return None


def _norm(weights: Weights) -> float:
    return float(torch.stack([tensor.pow(2).sum() for tensor in weights.values()]).sum().sqrt())
