"""The small models and their data, the same in the workers and in the reference.

Everything is reproducible: a model follows from its kind and seed, a batch from its number and the rank.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

WIDTH = 6
OUTPUTS = 3
VOCABULARY = 17
PADDING = -100
"""The target of a padded token."""
POISONS = {
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e30, "to -inf": 1e5, "to inf": 1e10,
}  # fmt: skip
"""Factors that make the gradient of a loss, or its norm, non-finite; the last two only that of a `Steep` model."""


class Block(nn.Module):
    """A residual block: a layer norm and a linear layer whose size does not divide evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = hidden + torch.tanh(self.linear(self.norm(hidden)))
        return result


class Regressor(nn.Module):
    """(batch, WIDTH) to (batch, OUTPUTS)."""

    _no_split_modules = ["Block"]
    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(WIDTH), Block(WIDTH)])
        self.head = nn.Linear(WIDTH, OUTPUTS)
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs + self.offset.to(inputs.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.head(hidden)
        return result


class Frozen(Regressor):
    """A regressor whose first block is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)


class Unused(Regressor):
    """A regressor with a block that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = Block(WIDTH)


class Wide(Regressor):
    """A regressor with enough parameters to measure: 64 MiB in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(Block(WIDTH))
        self.up = nn.Linear(WIDTH, 4096)
        self.wide = nn.Linear(4096, 4096)
        self.down = nn.Linear(4096, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(inputs + self.down(self.wide(self.up(inputs))))
        return result


class Uneven(Regressor):
    """A regressor whose second block is used only by ranks whose first input is positive."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](inputs + self.offset.to(inputs.dtype))
        if inputs[0, 0] > 0:
            hidden = self.blocks[1](hidden)
        result: torch.Tensor = self.head(hidden)
        return result


class Checkpointed(Regressor):
    """A regressor with activation checkpointing."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs + self.offset.to(inputs.dtype)
        for block in self.blocks:
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
        result: torch.Tensor = self.head(hidden)
        return result


class Shifted(Regressor):
    """A regressor that takes a keyword argument."""

    def forward(self, inputs: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return super().forward(inputs + shift)


class Scaled(Regressor):
    """A regressor with a non-persistent buffer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs * self.scale.to(inputs.dtype))


class Tracked(Regressor):
    """A regressor with buffers that training changes, a 1-D weight that is neither bias nor norm, and a scalar weight.

    The buffers affect only what a batch norm computes in evaluation mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm1d(WIDTH)
        self.second_norm = nn.BatchNorm1d(WIDTH)
        self.gains = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.temperature = nn.Parameter(torch.ones(1))
        for norm in (self.first_norm, self.second_norm):
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs + self.first_norm(inputs) + self.second_norm(inputs)
        return self.temperature * super().forward(self.gains * hidden)


class _Overflowing(torch.autograd.Function):
    """The identity, with a gradient in which large elements become -inf, and very large ones inf."""

    @staticmethod
    def forward(ctx: object, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        size = gradient.abs()
        return gradient.masked_fill(size > 1e2, -torch.inf).masked_fill(size > 1e7, torch.inf)


class Steep(Regressor):
    """A regressor with one weight whose gradient overflows before any other's: in one direction, and without a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(inputs) + _Overflowing.apply(self.shift)  # type: ignore[no-untyped-call]
        return result


class Deep(nn.Module):
    """Eight matrices of 16 MiB each, for measuring memory; (batch, WIDTH) to (batch, OUTPUTS)."""

    _no_split_modules = ["Linear"]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(8)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.pad(inputs, (0, 2048 - WIDTH))
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, :OUTPUTS]


class Matrices(nn.Module):
    """A regressor of matrices alone, which Muon trains."""

    _no_split_modules = ["Linear"]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        self.head = nn.Linear(WIDTH, OUTPUTS, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = inputs + torch.tanh(layer(inputs))
        result: torch.Tensor = self.head(inputs)
        return result


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


class Mixer(nn.Module):
    """A causal layer: each position sees the mean of the positions up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normal = self.norm(hidden)
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
        past = normal.cumsum(dim=1) / counts
        result: torch.Tensor = hidden + torch.tanh(self.linear(torch.cat([normal, past], dim=-1)))
        return result


class LanguageModel(nn.Module):
    """(batch, length) tokens to (batch, length, VOCABULARY) logits; the embedding is tied to the head."""

    _no_split_modules = ["Mixer"]

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList([Mixer(WIDTH), Mixer(WIDTH)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for mixer in self.mixers:
            hidden = mixer(hidden)
        result: torch.Tensor = 2 * self.head(hidden)
        return result


class Centred(LanguageModel):
    """A language model with a buffer that training changes, and that changes the logits."""

    center: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.linspace(-1, 1, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if self.training:
            self.center.mul_(0.5).add_(hidden.detach().float().mean(dim=(0, 1)))
        for mixer in self.mixers:
            hidden = mixer(hidden - self.center.to(hidden.dtype))
        result: torch.Tensor = 2 * self.head(hidden)
        return result


class Policy(LanguageModel):
    """A language model that names its head, takes a mask, and returns what the head computes."""

    factor = 1

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        for mixer in self.mixers:
            hidden = mixer(hidden)
        result: torch.Tensor = self.head(hidden)
        return result if self.factor == 1 else self.factor * result


class ScaledPolicy(Policy):
    """A policy that changes its logits after the head."""

    factor = 3


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


def llama() -> nn.Module:
    """A tiny Llama with tied embeddings, for engines that only run models of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _transformer(name: str, **settings: object) -> nn.Module:
    """A tiny causal language model of transformers, with four heads of one key-value head unless ``settings`` say otherwise."""
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    family, _, head = name.partition(" ")
    config = getattr(transformers, f"{family}Config")(**{**common, **settings})
    model: nn.Module = getattr(transformers, f"{family}For{head or 'CausalLM'}")(config)
    return model


def _recomputed() -> nn.Module:
    model: Any = _transformer("Llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=18)
    model.gradient_checkpointing_enable()
    model.train()
    return cast(nn.Module, model)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "regressor": Regressor,
    "frozen": Frozen,
    "unused": Unused,
    "uneven": Uneven,
    "wide": Wide,
    "checkpointed": Checkpointed,
    "shifted": Shifted,
    "scaled": Scaled,
    "tracked": Tracked,
    "steep": Steep,
    "deep": Deep,
    "matrices": Matrices,
    "language": LanguageModel,
    "centred": Centred,
    "policy": Policy,
    "scaled policy": ScaledPolicy,
    "llama": llama,
    "grouped": partial(_transformer, "Llama"),
    "windowed": partial(_transformer, "Mistral", num_attention_heads=5, hidden_size=20, sliding_window=3),
    "recomputed": _recomputed,
    "nine heads": partial(_transformer, "Llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=18),
    "one head": partial(_transformer, "Llama", num_attention_heads=1),
    "capped": partial(_transformer, "Gemma2", attn_logit_softcapping=30.0, layer_types=2 * ["full_attention"]),
    "recurrent": partial(_transformer, "Mamba"),
    "pooled": partial(_transformer, "Llama SequenceClassification"),
}


INDIFFERENT = "indifferent "
"""Prefix of the kind of a language model that gives all tokens the same probability, whatever the prompt."""


def build(kind: str, seed: int) -> nn.Module:
    """A model whose weights depend only on ``kind`` and ``seed``. The caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` records a stack for CUDA, which is slow
        model = KINDS[kind.removeprefix(INDIFFERENT)]()
        for parameter in model.parameters():  # initial norms of 1 and biases of 0 would hide errors
            parameter.data.add_(0.1 * torch.randn_like(parameter))
            if kind.startswith(INDIFFERENT):
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


def policy_loss(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A policy gradient in which each token has a weight of its own, with an entropy bonus."""
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
