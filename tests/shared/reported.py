"""What users of training libraries have reported: things that a script does to a model or its optimizer around updates.

On every strategy, each gives the result of plain torch, or is refused by name. Every rank runs `outcomes`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from exports import opened
from programs import tokens
from torch import nn
from torch.nn.functional import cross_entropy

from lightrft.config import LightRFTError
from lightrft.strategy import StrategyBase

STEPS = 2
"""Micro-batches of an update."""
RIGHT = "as in plain torch"


class Block(nn.Module):
    """Residual; its rows do not divide by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 11, bias=False), nn.Linear(11, 8, bias=False)

    def forward(self, states_BTC: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = states_BTC + self.down(torch.tanh(self.up(states_BTC)))
        return result


class Small(nn.Module):
    """A language model of matrices."""

    _no_split_modules = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 17, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        states_BTC = self.embed(tokens_BT)
        for block in self.blocks:
            states_BTC = block(states_BTC)
        logits_BTV: torch.Tensor = self.head(states_BTC)
        return logits_BTV


def small() -> Small:
    """The same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Small()


def loss_of(model: nn.Module, *place: int) -> torch.Tensor:
    tokens_BT = tokens(*place)
    return cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())


@dataclass(kw_only=True)
class Run:
    """A model that trains: with a strategy, or in plain torch for all ranks."""

    model: Any
    optimizer: torch.optim.Optimizer
    ranks: int
    strategy: StrategyBase | None = None
    norms: list[float] = field(default_factory=list)

    def update(self, within: Callable[[], object] = lambda: None) -> None:
        """Make an update; calls ``within`` after each backward."""
        if self.strategy is not None:
            for micro in range(STEPS):
                loss = loss_of(self.model, len(self.norms), micro, self.strategy.get_rank())
                self.strategy.backward(loss, self.model, self.optimizer)
                within()
                result = self.strategy.optimizer_step(self.optimizer, self.model)
            self.norms.append(result.grad_norm or 0.0)
            return
        for micro in range(STEPS):
            for rank in range(self.ranks):
                (loss_of(self.model, len(self.norms), micro, rank) / STEPS / self.ranks).backward()
            within()
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
        self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None

    def evaluate(self, mode: Callable[[], Any] = torch.no_grad) -> None:
        with mode():
            self.model(tokens(9))


class ByRows(torch.optim.Optimizer):
    """Makes each row of a gradient as long as 1."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def direction(self, gradient: Any) -> Any:
        return gradient / (gradient.square().sum(1, keepdim=True).sqrt() + 1e-6)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(self.direction(parameter.grad) * self.param_groups[0]["lr"])


class ByMatrices(ByRows):
    """Makes each gradient as long as 1, as layer-wise rates do."""

    def direction(self, gradient: Any) -> Any:
        return gradient / (gradient.square().sum().sqrt() + 1e-6)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# Trainable or frozen


def _frozen_for_a_reference_pass(run: Run) -> None:
    for _ in range(2):
        run.model.head.requires_grad_(False)
        run.evaluate()
        run.model.head.requires_grad_(True)
        run.update()


def _frozen_after_an_evaluation(run: Run) -> None:
    run.update()
    run.evaluate()
    run.model.embed.requires_grad_(False)
    run.model.blocks[0].requires_grad_(False)
    run.optimizer.param_groups[0]["momentum"] = 0.0
    run.update()


def _evaluated_in_inference_mode(run: Run) -> None:
    run.update()
    run.evaluate(torch.inference_mode)
    run.update()


# Hooks


def _hook_on_rows(model: Small) -> None:
    keep = torch.zeros(17, 1)
    keep[5:9] = 1
    model.embed.weight.register_hook(lambda gradient: gradient * keep)


def _hook_that_doubles(model: Small) -> None:
    model.blocks[1].up.weight.register_hook(lambda gradient: gradient * 2)  # type: ignore[union-attr]


def _hook_on_the_sum(model: Small) -> None:
    def clear(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.zero_()

    model.head.weight.register_post_accumulate_grad_hook(clear)


# The optimizer


def _two_updates(run: Run) -> None:
    run.update()
    run.update()


def _group_added(run: Run) -> None:
    run.update()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def _group_appended(run: Run) -> None:
    run.optimizer.param_groups.append({**run.optimizer.param_groups[0], "params": [run.model.head.weight]})
    run.update()


def _parameter_appended(run: Run) -> None:
    run.optimizer.param_groups[0]["params"].append(run.model.head.weight)
    run.update()


# Weights


def _weights_scaled(run: Run) -> None:
    run.update()
    with torch.no_grad():
        run.model.head.weight.mul_(0.5)
    run.update()


def _weights_of_the_root_copied(run: Run) -> None:
    with torch.no_grad():
        run.model.embed.weight.copy_(run.model.embed.weight * 2)
    run.update()


def _weights_of_a_layer_set(run: Run) -> None:
    run.update()
    run.evaluate()
    with torch.no_grad():
        run.model.blocks[0].down.weight.zero_()
    run.update()


# Other models


def _layer_of_two_models(run: Run) -> None:
    other = small()
    other.blocks[1] = run.model.blocks[1]
    assert run.strategy is not None
    run.strategy.prepare(other)


def _reference_with_the_embedding(run: Run) -> None:
    other = small()
    other.embed = run.model.embed
    assert run.strategy is not None
    run.strategy.prepare((other, _sgd(other), None))


@dataclass(kw_only=True)
class Case:
    """What a script does, and where it is refused."""

    script: Callable[[Run], None] = _two_updates
    before: Callable[[Small], None] = lambda model: None
    """Called before preparing."""
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = _sgd
    refused: Mapping[str, str] = field(default_factory=dict)
    """By strategy: words of the refusal. "all": on every strategy."""


_PARTS = "ZeRO flattens the parameters"
_GROUPS = "expected the parameter groups with which Small was prepared"
CASES = {
    "frozen for a reference pass": Case(script=_frozen_for_a_reference_pass),
    "frozen after an evaluation": Case(
        script=_frozen_after_an_evaluation, refused=dict.fromkeys(("zero2", "zero3"), "ZeRO would continue to update them")
    ),
    "evaluated in inference mode": Case(script=_evaluated_in_inference_mode),
    "hook on rows": Case(before=_hook_on_rows),
    "hook that doubles": Case(before=_hook_that_doubles),
    "hook on the sum": Case(
        before=_hook_on_the_sum, refused=dict.fromkeys(("fsdp", "zero2", "zero3"), "Use register_hook")
    ),
    "Adafactor": Case(
        optimizer_of=lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
        refused={"fsdp": "got Adafactor", "zero2": _PARTS, "zero3": _PARTS},
    ),
    "optimizer of rows": Case(
        optimizer_of=lambda model: ByRows(model.parameters()), refused=dict.fromkeys(("zero2", "zero3"), _PARTS)
    ),
    "optimizer of matrices": Case(
        optimizer_of=lambda model: ByMatrices(model.parameters()), refused=dict.fromkeys(("zero2", "zero3"), _PARTS)
    ),
    "group added": Case(script=_group_added, refused={"all": _GROUPS}),
    "group appended": Case(script=_group_appended, refused={"all": _GROUPS}),
    "parameter appended": Case(script=_parameter_appended, refused={"all": _GROUPS}),
    "zero_grad of the optimizer": Case(
        script=lambda run: run.update(run.optimizer.zero_grad), refused={"all": "SGD.zero_grad: expected no call within"}
    ),
    "zero_grad of the model": Case(
        script=lambda run: run.update(run.model.zero_grad), refused={"all": "zero_grad of the model: expected no call within"}
    ),
    "a direct step": Case(
        script=lambda run: run.update(run.optimizer.step), refused={"all": "Call strategy.optimizer_step"}
    ),
    "weights scaled": Case(script=_weights_scaled, refused={"zero3": "Use load_model"}),
    "weights of the root copied": Case(script=_weights_of_the_root_copied, refused={"zero3": "Use load_model"}),
    "weights of a layer set": Case(script=_weights_of_a_layer_set, refused={"zero3": "Use load_model"}),
    "layer of two models": Case(script=_layer_of_two_models, refused={"all": "shares 2 with Small"}),
    "reference with the embedding": Case(script=_reference_with_the_embedding, refused={"all": "shares 1 with Small"}),
}  # fmt: skip


def outcomes(strategy: str, **settings: Any) -> dict[str, str]:
    """By case: whether it is as in plain torch, or the error."""
    batch = STEPS * int(os.environ.get("WORLD_SIZE", "1"))
    with opened(strategy, max_norm=1.0, **{**settings, "train_batch_size": batch}) as made:
        return {name: _outcome(made, case) for name, case in CASES.items()}


def _outcome(made: StrategyBase, case: Case) -> str:
    model = small()
    case.before(model)
    optimizer = case.optimizer_of(model)
    try:
        prepared, optimizer, _ = made.prepare((model, optimizer, None))
        run = Run(model=prepared, optimizer=optimizer, ranks=made.world_size, strategy=made)
        case.script(run)
    except LightRFTError as error:
        return f"{type(error).__name__}: {error}"
    plain = small()
    case.before(plain)
    wanted = Run(model=plain, optimizer=case.optimizer_of(plain), ranks=made.world_size)
    case.script(wanted)
    actual = {name: tensor.clone() for bucket in made.full_parameters(prepared) for name, tensor in bucket}
    off = max(float((actual[name] - tensor).abs().max()) for name, tensor in plain.state_dict().items())
    same = off < 1e-4 and run.norms == pytest.approx(wanted.norms, rel=1e-3)
    return RIGHT if same else f"norms {run.norms} instead of {wanted.norms}, weights off by {off:.1e}"


def unexpected_outcomes(results: Mapping[str, str], strategy: str) -> list[str]:
    """The cases of ``results`` that are neither as in plain torch nor refused as they should be on ``strategy``."""
    wrong = []
    for name, case in CASES.items():
        words = case.refused.get("all") or case.refused.get(strategy)
        if (words is None and results[name] != RIGHT) or (words is not None and words not in results[name]):
            wrong.append(f"{name}: {results[name]}")
    return wrong
