"""The examples in the pages on losses over tokens run, on one process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import llama

from lightrft.strategy import FakeStrategy

PAGES = Path(__file__).parents[3] / "docs"
LENGTHS = [3, 5, 2, 4]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def alone(settings: dict[str, Any]) -> FakeStrategy:
    """The strategy of one process, in place of one of several ranks."""
    assert settings.pop("strategy") == "fsdp"
    assert settings.pop("sp_size", 2) == 2
    return FakeStrategy(bf16=False, train_batch_size=1, **settings)


@pytest.fixture
def names():
    """What the examples take for granted."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    input_ids = torch.randint(1, 17, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones(2, 6).long(), "loss_mask": torch.ones(2, 6)}
    batch["position_ids"] = torch.arange(6).expand(2, 6)
    given = {
        "torch": torch, "get_strategy": alone, "model": model, "optimizer": optimizer, "scheduler": None,
        "loader": [batch], "input_ids": input_ids, "attention_mask": batch["attention_mask"],
        "advantages": torch.ones(2, 5),
    }  # fmt: skip
    yield given
    given["strategy"].close()


def run(source: str, names: dict[str, Any]) -> None:
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    exec(compile(source, "example", "exec"), names)  # noqa: S102 - our own page
    assert any(not torch.equal(now, then) for now, then in zip(names["model"].parameters(), before, strict=True))


def test_sequence_parallelism(names):
    (example,) = examples("sequence-parallelism.md")
    run(example, names)


def test_log_probabilities_without_the_logits(names):
    example, _ = examples("performance.md")
    run(example + "strategy.optimizer_step(optimizer, model)\n", names)
    assert names["log_probs"].shape == names["entropy"].shape == (2, 5)


def test_micro_batches_by_token_budget(names):
    _, example = examples("performance.md")

    def loss_of(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return model(batch).logits.logsumexp(-1).sum(), batch.numel()

    strategy = alone({"strategy": "fsdp"})
    model, optimizer, _ = strategy.prepare((names["model"], names["optimizer"], None))
    rows = [torch.ones(length).long() for length in LENGTHS]
    names |= {
        "strategy": strategy, "model": model, "optimizer": optimizer, "lengths": LENGTHS, "sequences": rows, "shortest": rows[2], "loss_of": loss_of,
        "collate": lambda chosen: torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True),
    }  # fmt: skip
    run(example.replace("8192", "8"), names)
    assert names["result"].denominator >= sum(LENGTHS)
