"""Builds the small models and their data, the same in the workers and in the reference.

Everything is reproducible: a model follows from its kind and seed, a batch from its number and the rank.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

import torch
from torch import nn

from lightrft.conformance.language_models import (
    VOCABULARY,
    Centred,
    LanguageModel,
    Policy,
    ScaledPolicy,
    llama,
    recomputed,
    transformer,
)
from lightrft.conformance.regressors import (
    OUTPUTS,
    WIDTH,
    Checkpointed,
    Deep,
    Frozen,
    KeywordArgument,
    Matrices,
    OverflowingGradient,
    Regressor,
    RunningStatistics,
    Scaled,
    Uneven,
    Unused,
    Wide,
)

PADDING = -100
"""The target of a padded token."""
POISONS = {
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e30, "to -inf": 1e5, "to inf": 1e10,
}  # fmt: skip
"""Factors that make the gradient of a loss, or its norm, non-finite; the last two only that of an `OverflowingGradient` model."""


class TrustRatio(torch.optim.Optimizer):
    """Each tensor moves by its own norm times the learning rate, against its gradient, as in LARS."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ratio = parameter.norm() / (parameter.grad.norm() + 1e-8)
                    parameter.sub_(parameter.grad * (group["lr"] * ratio))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
    "TrustRatio": TrustRatio,
}
"""Optimizers that need whole matrices."""


class Wrapper(nn.Module):
    """A wrapper with ``.model``, as in LightRFT, that is not marked as an actor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


class Actor(Wrapper):
    """A wrapper with ``.model``, marked as an actor, as in LightRFT."""

    is_actor = True


KINDS: dict[str, Callable[[], nn.Module]] = {
    "regressor": Regressor,
    "frozen": Frozen,
    "unused": Unused,
    "uneven": Uneven,
    "wide": Wide,
    "checkpointed": Checkpointed,
    "keyword argument": KeywordArgument,
    "scaled": Scaled,
    "running statistics": RunningStatistics,
    "overflowing gradient": OverflowingGradient,
    "deep": Deep,
    "matrices": Matrices,
    "language": LanguageModel,
    "centred": Centred,
    "policy": Policy,
    "scaled policy": ScaledPolicy,
    "llama": llama,
    "grouped": partial(transformer, "Llama"),
    "windowed": partial(transformer, "Mistral", num_attention_heads=5, hidden_size=20, sliding_window=3),
    "recomputed": recomputed,
    "nine heads": partial(transformer, "Llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=18),
    "one head": partial(transformer, "Llama", num_attention_heads=1),
    "capped": partial(transformer, "Gemma2", attn_logit_softcapping=30.0, layer_types=2 * ["full_attention"]),
    "recurrent": partial(transformer, "Mamba"),
    "opt": partial(transformer, "OPT", word_embed_proj_dim=16, ffn_dim=24, dropout=0.0),
    "pooled": partial(transformer, "Llama SequenceClassification"),
}
UNIFORM = "uniform "
"""Prefix of the kind of a language model that gives all tokens the same probability, whatever the prompt."""


def build(kind: str, seed: int) -> nn.Module:
    """A model whose weights depend only on ``kind`` and ``seed``. The caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` records a stack for CUDA, which is slow
        model = KINDS[kind.removeprefix(UNIFORM)]()
        for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide errors
            parameter.data.add_(0.1 * torch.randn_like(parameter))
            if kind.startswith(UNIFORM):
                parameter.data.zero_()
    return model


def is_language(model: nn.Module) -> bool:
    """Whether ``model``, or the model that it wraps, takes tokens."""
    return any(isinstance(part, LanguageModel) or hasattr(part, "get_input_embeddings") for part in model.modules())


def every_other_row(gradient: torch.Tensor) -> torch.Tensor:
    """Return ``gradient`` with its odd rows set to zero, as a script does that trains some rows of an embedding."""
    rows = torch.arange(gradient.shape[0], device=gradient.device) % 2 == 0
    return gradient * rows.view(-1, *[1] * (gradient.ndim - 1))


def batch(number: int, rank: int, rows: int, language: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one micro-batch on one rank."""
    inputs, targets = _batch(number, rank, rows, language)
    return inputs.clone(), targets.clone()  # the caller's own: a strategy may write into them


@lru_cache(maxsize=4096)
def _batch(number: int, rank: int, rows: int, language: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * number + rank)
    if language:
        tokens = torch.randint(VOCABULARY, (rows, 8), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    inputs = torch.randn(rows, WIDTH, generator=generator)
    targets = torch.randn(rows, OUTPUTS, generator=generator)
    inputs[0, 0] = inputs[0, 0].abs() * (1 if (number + rank) % 2 else -1)  # see Uneven
    return inputs, targets


def padded_batch(number: int, rank: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, 8) of one micro-batch on one rank, padded at both ends, and their mask."""
    tokens = batch(number, rank, rows, language=True)
    mask = torch.ones(rows, 8, dtype=torch.int64)
    mask[0, :2] = mask[-1, -3:] = 0
    return torch.cat([tokens[0], tokens[1][:, -1:]], dim=1), mask


PACKED_LENGTHS = (3, 5)
"""Of the sequences that `packed_batch` packs."""


def packed_batch(number: int, rank: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, 8) of two packed sequences, and their position ids, which restart."""
    tokens, _ = padded_batch(number, rank, rows)
    return tokens, torch.cat([torch.arange(length) for length in PACKED_LENGTHS]).repeat(rows, 1)


def policy_loss(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A policy gradient in which each token has its own weight, with an entropy bonus."""
    weights = torch.linspace(-1, 2, log_probs.numel(), device=log_probs.device).view_as(log_probs)
    return (weights * log_probs.exp()).mean() - 0.1 * entropy.mean()


def logits_of(model: nn.Module, inputs: torch.Tensor, **more: object) -> torch.Tensor:
    """The outputs of ``model`` as a tensor, also if it returns them in an object."""
    outputs = model(inputs, **more)
    logits: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return logits


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error, or cross entropy for a language model; in fp32."""
    outputs = logits_of(model, inputs).float()
    if targets.dtype == torch.int64:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return nn.functional.mse_loss(outputs, targets)


def loss_over_samples(model: nn.Module, samples: Sequence[int], device: torch.device) -> torch.Tensor:
    """The mean loss of a regressor over ``samples``, which are numbers of a dataset."""
    inputs, targets = (
        torch.cat(parts).to(device) for parts in zip(*(batch(each, 0, 1, False) for each in samples), strict=True)
    )
    return loss_of(model, inputs, targets)


def items_in(sequence: int) -> int:
    """The number of items, tokens or rows, of a sequence."""
    return 1 + 5 * sequence % 7


def loss_over(model: nn.Module, sequences: Sequence[int]) -> torch.Tensor:
    """The sum of the losses of all items of ``sequences``, in fp32; 0 with a graph if there are none.

    Tokens are padded to the longest sequence.
    """
    language, chosen = is_language(model), list(sequences) or [0]
    pairs = [batch(5_000 + sequence, 0, items_in(sequence), language) for sequence in chosen]
    device = next(model.parameters()).device
    if not language:
        inputs, targets = (torch.cat(parts).to(device) for parts in zip(*pairs, strict=True))
        losses = nn.functional.mse_loss(logits_of(model, inputs).float(), targets, reduction="none").mean(dim=1)
        return losses.sum() * bool(sequences)
    longest = max(map(items_in, chosen))
    rows = [
        (tokens[0, : items_in(number)], following[0, : items_in(number)])
        for number, (tokens, following) in zip(chosen, pairs, strict=True)
    ]
    padded = [nn.functional.pad(tokens, (0, longest - len(tokens))) for tokens, _ in rows]
    wanted = [nn.functional.pad(following, (0, longest - len(following)), value=PADDING) for _, following in rows]
    logits = logits_of(model, torch.stack(padded).to(device)).float().flatten(0, 1)
    loss = nn.functional.cross_entropy(
        logits, torch.stack(wanted).to(device).flatten(), ignore_index=PADDING, reduction="sum"
    )
    return loss * bool(sequences)
