"""What two ranks that share a sequence save for the backward pass, compared with a rank that has it alone.

``torchrun --standalone --nproc-per-node=2 benchmarks/sequence_parallel.py [--tokens 4096] [--at-most 0.65]``. Prints the bytes of saved
tensors of a rank, parameters left out, and the seconds of a forward and backward pass, with sp_size=1 and sp_size=2.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.strategy import StrategyBase, get_strategy

SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 16_384}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--at-most", type=float, default=0.65, help="the ratio of bytes above which to fail")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    figures = {}
    for size in (1, 2):
        settings = {
            "strategy": "fsdp",
            "device": args.device,
            "bf16": False,
            "train_batch_size": 2 // size,
            "sp_size": size,
        }
        with get_strategy(settings) as strategy:
            saved, seconds = (
                strategy.all_reduce(float(figure), op="max") for figure in measured(strategy, args.tokens)
            )
            figures[size] = saved
            strategy.print(f"sp_size={size}: at most {saved / 2**20:.0f} MiB saved by a rank, {seconds:.2f} s a step")
            if size == 2:
                strategy.print(f"saved bytes, sp_size 2 / 1: {figures[2] / figures[1]:.2f}")
    return int(figures[2] / figures[1] > args.at_most)


def measured(strategy: StrategyBase, tokens: int) -> tuple[int, float]:
    """Bytes saved for the backward pass on this rank, and the seconds of the second of two steps."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    model, optimizer, _ = strategy.prepare((model, torch.optim.AdamW(model.parameters()), None))
    whole = {"input_ids": torch.arange(tokens, device=strategy.device)[None] % SIZES["vocab_size"]}
    whole["attention_mask"], whole["targets"] = torch.ones_like(whole["input_ids"]), whole["input_ids"].roll(-1)
    ranks, saved, seconds = strategy.sequence_parallel, 0, 0.0
    for _ in range(2):
        start = time.perf_counter()
        local = ranks.split(whole)
        inputs = {name: local[name] for name in ("input_ids", "attention_mask", "position_ids") if name in local}
        with counting(model) as storages:
            logits_BLV = model(**inputs, use_cache=False).logits.flatten(0, 1)
            losses_L = torch.nn.functional.cross_entropy(logits_BLV, local["targets"].flatten(), reduction="none")
            loss = ranks.gather(losses_L[None]).mean()
        saved = sum(storages.values())
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model)
        seconds = time.perf_counter() - start
    return saved, seconds


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
