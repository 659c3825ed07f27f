"""What two ranks that share a sequence save for the backward pass, compared with a rank that has it alone.

``torchrun --standalone --nproc-per-node=2 benchmarks/sequence_parallel.py [--tokens 4096]``. Prints the bytes of saved
tensors of a rank, parameters left out, and the seconds of a forward and backward pass, with sp_size=1 and sp_size=2.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import Goal, Report, parser
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.strategy import StrategyBase, get_strategy

SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 16_384}


def main() -> int:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--tokens", type=int, default=4096)
    args = arguments.parse_args()
    report = Report(args.output, int(os.environ.get("RANK", "0")))
    saved: dict[int, float] = {}
    seconds: dict[str, list[float]] = {}
    for size in (1, 2):
        settings = {
            "strategy": "fsdp",
            "device": args.device,
            "bf16": False,
            "train_batch_size": 2 // size,
            "sp_size": size,
        }
        with get_strategy(settings) as strategy:
            own_bytes, own_seconds = measured(strategy, args.tokens, args.rounds)
            saved[size] = strategy.all_reduce(float(own_bytes), op="max")
            seconds[f"sp_size {size}"] = strategy.all_reduce(torch.tensor(own_seconds), op="max").tolist()
    case = f"sequence parallelism, {args.tokens} tokens"
    for size, figure in saved.items():
        report.add(case, f"saved with sp_size {size}", [figure / 2**20], unit="MiB")
    report.add(case, "saved with sp_size 2 / saved with sp_size 1", [saved[2] / saved[1]], goal=Goal(0.65))
    report.times(case, seconds)
    return 0


def measured(strategy: StrategyBase, tokens: int, rounds: int) -> tuple[int, list[float]]:
    """Bytes saved for the backward pass on this rank, and the seconds of each step after the first."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    model, optimizer, _ = strategy.prepare((model, torch.optim.AdamW(model.parameters()), None))
    batch = {"input_ids": torch.arange(tokens, device=strategy.device)[None] % SIZES["vocab_size"]}
    batch["attention_mask"], batch["targets"] = torch.ones_like(batch["input_ids"]), batch["input_ids"].roll(-1)
    seconds: list[float] = []
    ranks, saved = strategy.sequence_parallel, 0
    for _ in range(1 + rounds):
        start = time.perf_counter()
        local = ranks.split(batch)
        inputs = {name: local[name] for name in ("input_ids", "attention_mask", "position_ids") if name in local}
        with counting(model) as storages:
            logits_BLV = model(**inputs, use_cache=False).logits.flatten(0, 1)
            losses_L = torch.nn.functional.cross_entropy(logits_BLV, local["targets"].flatten(), reduction="none")
            loss = ranks.gather(losses_L[None]).mean()
        saved = sum(storages.values())
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model)
        seconds.append(time.perf_counter() - start)
    return saved, seconds[1:]


@contextmanager
def counting(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of each storage that is saved in the body, except those of parameters, gathered or not."""
    storages: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # a freed storage may have the address of the next

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad) and not isinstance(tensor._base, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield storages


if __name__ == "__main__":
    sys.exit(main())
