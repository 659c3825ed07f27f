"""Memory and time of per-token log-probabilities and entropies without the logits, compared with those from the logits.

``python benchmarks/log_probs.py [--device cuda] [--dtype bfloat16]``. The shape is that of SmolLM2-135M's head: 512 tokens,
hidden size 576, 49,152 words. Memory is the peak beyond the inputs and the gradients that remain: on the CPU of all that
torch allocates, from its profiler; on CUDA of its allocator. Times alternate in one process, so that other load on the
machine affects both equally. Prints the ratios, chunk by chunk over plain.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from measure import Goal, Report, interleaved, parser
from models import SHAPE
from torch.profiler import ProfilerActivity, profile

from lightrft.strategy import linear_log_probs

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states (N, H), the weight of the head (V, H), and targets (N,)."""
LossOf = Callable[[Inputs, bool], torch.Tensor]
"""A loss of log-probabilities and, if the flag is set, of entropies."""


def main() -> int:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = arguments.parse_args()
    inputs = make_inputs(args.tokens, torch.device(args.device), getattr(torch, args.dtype))
    report = Report(args.output)
    for entropy in (False, True):
        what = "log-probs and entropy" if entropy else "log-probs"
        case = f"{what}, {args.tokens} tokens, {args.dtype}"
        loops = {"from logits": from_logits, "chunked": without_logits}
        peaks = {name: peak_bytes(loss_of, inputs, entropy) for name, loss_of in loops.items()}
        for name, peak in peaks.items():
            report.add(f"memory, {case}", name, [peak / 2**20], unit="MiB")
        share = peaks["chunked"] / peaks["from logits"]
        report.add(f"memory, {case}", "chunked / from logits", [share], goal=Goal(0.35))
        actions = {name: partial(forward_backward, loss_of, inputs, entropy) for name, loss_of in loops.items()}
        seconds = interleaved(actions, args.rounds, inputs[0].device)
        report.compare(f"time, {case}", seconds, "from logits", {"chunked": Goal(1.3)})
    return 0


def make_inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden, words = int(SHAPE["hidden_size"]), int(SHAPE["vocab_size"])
    hidden_NH = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(words, hidden, generator=generator) * 0.02
    targets_N = torch.randint(words, (tokens,), generator=generator).to(device)
    return hidden_NH.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets_N


def from_logits(inputs: Inputs, entropy: bool) -> torch.Tensor:
    """The loss as trainers compute it."""
    hidden_NH, weight, targets_N = inputs
    log_softmax_NV = (hidden_NH @ weight.t()).float().log_softmax(-1)
    loss = log_softmax_NV.gather(1, targets_N.unsqueeze(1)).mean()
    return loss + (log_softmax_NV.exp() * log_softmax_NV).sum(1).mean() if entropy else loss


def without_logits(inputs: Inputs, entropy: bool) -> torch.Tensor:
    hidden_NH, weight, targets_N = inputs
    result = linear_log_probs(hidden_NH, weight, targets_N, entropy=entropy)
    loss = result.log_probs.mean()
    return loss if result.entropy is None else loss - result.entropy.mean()


def forward_backward(loss_of: LossOf, inputs: Inputs, entropy: bool) -> None:
    for tensor in inputs[:2]:
        tensor.grad = None
    loss_of(inputs, entropy).backward()


def peak_bytes(loss_of: LossOf, inputs: Inputs, entropy: bool) -> int:
    """Bytes beyond the inputs and the gradients that remain, at the peak of a forward and a backward pass."""
    remaining = sum(tensor.nbytes for tensor in inputs[:2])
    for tensor in inputs[:2]:
        tensor.grad = None
    if inputs[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(loss_of, inputs, entropy)
        return torch.cuda.max_memory_allocated() - before - remaining
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(loss_of, inputs, entropy)
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest - remaining


if __name__ == "__main__":
    sys.exit(main())
