"""Models, data and the plain torch that everything is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from lightrft.strategy.backend.adamw import adamw

WIDTH = 12
RATE, DECAY = 1e-3, 0.01


class Mixed(nn.Module):
    """A model with a bit of everything: norms, biases, a tied weight, a frozen layer, a parameter without dimensions, a buffer."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, WIDTH)
        self.hidden = nn.Linear(WIDTH, 3 * WIDTH + 1)
        self.norm = nn.LayerNorm(3 * WIDTH + 1)
        self.out = nn.Linear(3 * WIDTH + 1, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.detour = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 17, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.linspace(0, 1, WIDTH))

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        states_BTC = self.embed(tokens_BT)
        states_BTC = states_BTC + self.out(gelu(self.norm(self.hidden(states_BTC))))
        if detour:
            states_BTC = states_BTC + self.detour(states_BTC)
        states_BTC = self.frozen(states_BTC) * self.scale + self.offset.to(states_BTC.dtype)
        logits_BTV: torch.Tensor = self.head(states_BTC)
        return logits_BTV


def mixed(seed: int = 3) -> Mixed:
    """A `Mixed`, the same for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mixed()


def tokens(*numbers: int) -> torch.Tensor:
    """A batch of token ids, another for each place."""
    generator = torch.Generator().manual_seed(sum(number * 1009**index for index, number in enumerate(numbers, 1)))
    return torch.randint(0, 17, (2, 6), generator=generator)


def loss_of(model: nn.Module, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
    """Cross-entropy of the next token, in fp32."""
    logits_BTV = model(tokens_BT[:, :-1], detour=detour).float()
    return cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is trained: the same for a strategy and for plain torch."""

    updates: int = 20
    accumulation_steps: int = 1
    """K."""
    lengths: Sequence[int] = ()
    """Micro-batches of each update, if not K."""
    max_norm: float | None = None
    losses: str = "one"
    """How the losses of a micro-batch are computed; see `training.backward`."""
    detours: Sequence[tuple[int, int]] = ()
    """Updates and micro-batches that use the layer ``detour``."""
    detour_of: int | None = None
    """The only rank that does."""
    skipped: Sequence[int] = ()
    """Updates that are left out, with their data."""
    poisoned: Sequence[int] = ()
    """Updates in which the last rank's loss is not a number."""
    decaying_rate: bool = False

    def micro_batches(self) -> Iterator[tuple[int, int, bool]]:
        """Update, micro-batch, and whether it is the update's last."""
        for update in range(self.updates):
            if update not in self.skipped:
                length = self.lengths[update] if self.lengths else self.accumulation_steps
                for micro in range(length):
                    yield update, micro, micro == length - 1

    def loss(self, model: nn.Module, update: int, micro: int, rank: int, second: bool = False) -> torch.Tensor:
        """One of the losses of a micro-batch on a rank."""
        detour = (update, micro) in self.detours and self.detour_of in (None, rank)
        return loss_of(model, tokens(update, micro, rank, int(second)), detour)


@dataclass(kw_only=True)
class Observed:
    """The result of a program."""

    parameters: dict[str, torch.Tensor]
    norms: list[float | None] = field(default_factory=list)


def reference(program: Program, ranks: int, build: Callable[[], nn.Module] = mixed) -> Observed:
    """``program`` in plain torch, one process for all ranks."""
    model = build()
    optimizer = adamw(model, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    observed, losses = Observed(parameters={}), 0
    for update, micro, last in program.micro_batches():
        for rank in range(ranks):
            loss = program.loss(model, update, micro, rank)
            if program.losses != "one":
                loss = loss + program.loss(model, update, micro, rank, second=True)
            # Scaled by K here; the number of micro-batches of this update follows below.
            (loss / ranks / program.accumulation_steps).backward()
        losses += 1
        if last:
            for parameter in trained:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient * (program.accumulation_steps / losses)
            observed.norms.append(nn.utils.clip_grad_norm_(trained, program.max_norm or 1e9).item())
            optimizer.step()
            optimizer.zero_grad()
            losses = 0
            if program.decaying_rate:
                schedule.step()
    observed.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return observed


def relative(got: Observed, wanted: Observed, build: Callable[[], nn.Module] = mixed) -> float:
    """2-norm of the difference over the 2-norm of the whole update."""
    start = {name: parameter.detach() for name, parameter in build().named_parameters()}
    names = wanted.parameters
    difference = sum(float((got.parameters[name] - names[name]).double().square().sum()) for name in names)
    update = sum(float((names[name] - start[name]).double().square().sum()) for name in names)
    return (difference / update) ** 0.5


def furthest(got: Observed, wanted: Observed) -> float:
    """Largest absolute difference of an element."""
    return max(float((got.parameters[name] - parameter).abs().max()) for name, parameter in wanted.parameters.items())
