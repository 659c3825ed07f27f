"""Sequences that several ranks share: training, generation and mistakes, for any strategy."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from llamas import llama, with_adapter
from torch import nn
from torch.nn.functional import pad

from lightrft.strategy import StrategyBase
from lightrft.strategy.parallel import attention

of_version_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="needs transformers 5, for sequence parallelism"
)
FORMS = ("full", "left", "packed")
LENGTHS = (11, 12, 13)


def built(kind: str) -> Any:
    """A model: a Llama, one with a LoRA adapter, or one that recomputes its layers."""
    if kind == "adapter":
        return with_adapter()
    model = llama()
    if kind != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def batch(update: int, data_rank: int) -> dict[str, torch.Tensor]:
    """A batch of two sequences, with the next token of each token in ``targets`` and its weight in ``weights``."""
    generator = torch.Generator().manual_seed(100 * update + data_rank)
    form, length = FORMS[update % len(FORMS)], LENGTHS[update % len(LENGTHS)]
    tokens_BS = torch.randint(3, 17, (2, length), generator=generator)
    weights_BS = torch.ones(2, length)
    weights_BS[:, -1] = 0
    more: dict[str, torch.Tensor] = {}
    if form == "packed":
        more = {"position_ids": torch.cat([torch.arange(5), torch.arange(length - 5)]).repeat(2, 1)}
        weights_BS[:, 4] = 0
    else:
        more = {"attention_mask": torch.ones(2, length, dtype=torch.long)}
        if form == "left":
            more["attention_mask"][0, :3] = weights_BS[0, :3] = 0
    return {"input_ids": tokens_BS, **more, "targets": pad(tokens_BS[:, 1:], (0, 1)), "weights": weights_BS}


def log_probs(model: nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each target."""
    names = ("input_ids", "attention_mask", "position_ids")
    logits_BSV = model(**{name: given[name] for name in names if name in given}, use_cache=False).logits.float()
    values: torch.Tensor = logits_BSV.log_softmax(-1).gather(-1, given["targets"][..., None])[..., 0]
    return values


def loss_of(values: torch.Tensor, full_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return -(values * full_batch["weights"]).sum() / full_batch["weights"].sum()


def trained(made: StrategyBase, kind: str, updates: int = 3) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights after a few updates, and the norms of the gradients."""
    model = built(kind)
    model, optimizer, _ = made.prepare((model, torch.optim.AdamW(_trainable(model), lr=1e-3), None))
    ranks, norms = made.sequence_parallel, []
    for update in range(updates):
        full_batch = batch(update, ranks.data_rank)
        values = ranks.gather(log_probs(model, ranks.split(full_batch)))
        made.backward(loss_of(values, full_batch), model, optimizer)
        norms.append(made.optimizer_step(optimizer, model).grad_norm or 0.0)
    names = dict(_named(made.unwrap_model(model)))
    return {
        name: tensor.clone()
        for bucket in made.full_parameters(model, dtype=torch.float32)
        for name, tensor in bucket
        if name in names
    }, norms


def plain(kind: str, data_ranks: int, max_norm: float, updates: int = 3) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same in plain torch."""
    model = built(kind)
    optimizer, norms = torch.optim.AdamW(_trainable(model), lr=1e-3), []
    for update in range(updates):
        for rank in range(data_ranks):
            full_batch = batch(update, rank)
            (loss_of(log_probs(model, full_batch), full_batch) / data_ranks).backward()
        norms.append(float(nn.utils.clip_grad_norm_(_trainable(model), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return dict(_named(model)), norms


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def assert_alike(
    observed: list[tuple[dict[str, torch.Tensor], list[float]]], kind: str, data_ranks: int, max_norm: float
) -> None:
    """Every rank has the weights and norms of plain torch."""
    wanted, norms = plain(kind, data_ranks, max_norm)
    for weights, seen in observed:
        assert weights.keys() & wanted.keys()
        furthest = max((weights[name] - wanted[name]).abs().max().item() for name in weights.keys() & wanted.keys())
        assert furthest < 2e-6
        assert all(abs(a / b - 1) < 1e-5 for a, b in zip(seen, norms, strict=True))


def generated(made: StrategyBase) -> tuple[list[int], list[int], str]:
    """Tokens before and while a model is prepared, and its attention after the strategy was closed."""
    model = llama().eval()
    prompt = torch.tensor([[0, 1, 5, 9]])
    mask = (prompt != 0).long()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(prompt, **settings)
    prepared = made.prepare(model)
    with torch.no_grad():
        got = prepared.generate(prompt, **settings)
    made.close()
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("lightrft")]
    assert not [part for part in model.modules() if part in attention._groups]
    return wanted.tolist(), got.tolist(), model.config._attn_implementation


# Mistakes


def _local(made: StrategyBase) -> tuple[Any, dict[str, torch.Tensor]]:
    full_batch = batch(0, 0)
    return made.prepare(llama()), made.sequence_parallel.split(full_batch)


def _without(name: str) -> Callable[[StrategyBase], object]:
    def mistake(made: StrategyBase) -> object:
        model, local = _local(made)
        return model(
            **{other: local[other] for other in ("input_ids", "attention_mask", "position_ids") if other != name}
        )

    return mistake


def _with_labels(made: StrategyBase) -> object:
    model, local = _local(made)
    names = ("input_ids", "attention_mask", "position_ids")
    return model(**{name: local[name] for name in names}, labels=local["targets"])


def _loss_of_a_slice(kind: str) -> Callable[[StrategyBase], object]:
    def mistake(made: StrategyBase) -> object:
        model = built(kind)
        model, optimizer, _ = made.prepare((model, torch.optim.AdamW(_trainable(model)), None))
        local = made.sequence_parallel.split(batch(0, 0))
        return made.backward(loss_of(log_probs(model, local), local), model, optimizer)

    return mistake


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    full_batch = batch(0, 0)
    return full_batch["input_ids"], full_batch["attention_mask"]


def _denominators_that_differ(made: StrategyBase) -> object:
    model = built("plain")
    model, optimizer, _ = made.prepare((model, torch.optim.AdamW(_trainable(model)), None))
    full_batch = batch(0, 0)
    local = made.sequence_parallel.split(full_batch)
    values = made.sequence_parallel.gather(log_probs(model, local))
    made.backward(-values.sum(), model, optimizer, denominator=10 + made.get_rank())
    return made.optimizer_step(optimizer, model, boundary=True)


def _split(given: Callable[[int], object]) -> Callable[[StrategyBase], object]:
    return lambda made: made.sequence_parallel.split(given(made.get_rank()))  # type: ignore[arg-type]


def _gathered(shape: tuple[int, ...], **more: int) -> Callable[[StrategyBase], object]:
    def mistake(made: StrategyBase) -> object:
        made.sequence_parallel.split(batch(0, 0))
        return made.sequence_parallel.gather(torch.zeros(shape), **more)

    return mistake


def _loss_of_another_model(made: StrategyBase) -> object:
    model, other = (
        made.prepare((model, torch.optim.AdamW(model.parameters()), None)) for model in (built("plain"), built("plain"))
    )
    values = made.sequence_parallel.gather(log_probs(other[0], made.sequence_parallel.split(batch(0, 0))))
    return made.backward(loss_of(values, batch(0, 0)), model[0], model[1])


def _compiled(made: StrategyBase) -> object:
    model = llama()
    return made.prepare(torch.compile(model, backend="eager"))


MISTAKES: dict[str, tuple[Callable[[StrategyBase], object], str, tuple[str, ...]]] = {
    "no mask": (_without("attention_mask"), "StrategyError", ("attention mask that split returned", "(2, 12)", "got none")),
    "no positions": (_without("position_ids"), "StrategyError", ("position_ids that split returned",)),
    "labels": (_with_labels, "StrategyError", ("no labels", "gather")),
    "loss of a slice": (_loss_of_a_slice("plain"), "StrategyError", ("backward:", "not gathered", "sequence_parallel.gather")),
    "loss of a slice, recomputed": (_loss_of_a_slice("reentrant"), "StrategyError", ("backward:", "not gathered")),
    "loss of a slice, adapter": (_loss_of_a_slice("adapter"), "StrategyError", ("backward:", "not gathered")),
    "no dict": (_split(lambda rank: [1]), "ArgumentTypeError", ("split: expected a dict", "got list ([1])")),
    "no inputs": (_split(lambda rank: {"tokens": torch.ones(1, 2)}), "ArgumentError", ("input_ids of shape (B, S)", "tokens")),
    "no tokens": (_split(lambda rank: {"input_ids": torch.ones(1, 0)}), "ArgumentError", ("(1, 0)", "at least one token")),
    "another mask": (
        _split(lambda rank: {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 3)}),
        "ArgumentError",
        ("attention_mask of shape (2, 4)", "got shape (2, 3)"),
    ),
    "other samples": (
        _split(lambda rank: batch(0, rank)),
        "StrategyError",
        ("same arguments on the 2 ranks", "rank 0: input_ids [2, 11]", "rank 1: input_ids [2, 11]", "setup_dataloader"),
    ),
    "a mask of its own": (
        _split(lambda rank: {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[1, 1, 1, rank]])}),
        "StrategyError",
        ("same arguments on the 2 ranks", "rank 0: attention_mask [1, 4]", "rank 1: attention_mask [1, 4]"),
    ),
    "a mask of floating-point numbers": (
        _split(lambda rank: {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.tensor([[1.0, 1.0, rank, 1.0]])}),
        "StrategyError",
        ("same arguments on the 2 ranks", "rank 0: attention_mask [1, 4]", "rank 1: attention_mask [1, 4]"),
    ),
    "entropy on one rank": (
        lambda made: made.token_log_probs(made.prepare(llama()), *_inputs(), entropy=made.get_rank() == 1),
        "StrategyError",
        ("token_log_probs", "same arguments on the 2 ranks", "rank 0: entropy False; rank 1: entropy True"),
    ),
    "denominators that differ": (
        _denominators_that_differ,
        "StrategyError",
        ("optimizer_step", "the same denominators", "got different sums in the update: rank 0: 10; rank 1: 11", "not that of a slice"),
    ),
    "too few values": (_gathered((2, 5)), "ArgumentError", ("gather:", "(2, 6) of 11", "got shape (2, 5)")),
    "another length": (_gathered((2, 6), length=9), "ArgumentError", ("gather:", "length=9")),
    "loss of another model": (_loss_of_another_model, "StrategyError", ("depends on a trainable parameter",)),
    "compiled": (_compiled, "UnsupportedOperationError", ("not compiled", "torch.compile", "sp_size=2")),
}  # fmt: skip
"""Each mistake, the class of the error on every rank, and words of its message."""


def mistaken(made: StrategyBase, what: str) -> tuple[str, str]:
    """The class and the message of the error."""
    try:
        MISTAKES[what][0](made)
    except Exception as error:  # noqa: BLE001 - it is what is tested
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def samples_of_another_rank(made: StrategyBase) -> tuple[str, str]:
    """The class and the message of the error if the last rank of four has another batch."""
    try:
        made.sequence_parallel.split(batch(0, int(made.get_rank() == 3)))
    except Exception as error:  # noqa: BLE001 - it is what is tested
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def shared_lists(made: StrategyBase) -> tuple[list[str], list[str], str]:
    """LightRFT's processor: this rank's items collected and returned, and the error for a number that does not divide."""
    processor, rank = made.sp_data_processor, made.get_rank()
    collected = processor.preprocess([f"{rank}a", f"{rank}b"])
    try:
        processor.postprocess([*collected, "more"])
    except ValueError as error:
        return list(collected), list(processor.postprocess(collected)), str(error)
    raise AssertionError("no error")


def with_token_log_probs(made: StrategyBase) -> list[float]:
    """How far token_log_probs, entropies and the norm of an update are from those of plain torch."""
    full_batch = batch(1, 0)
    mask_is_zero = (full_batch["attention_mask"][:, 1:] & full_batch["attention_mask"][:, :-1]) == 0
    ids, mask, targets = (
        full_batch["input_ids"],
        full_batch["attention_mask"],
        full_batch["targets"][:, :-1].masked_fill(mask_is_zero, -100),
    )
    plain_model, model = built("plain"), built("plain")
    model, optimizer, _ = made.prepare((model, torch.optim.AdamW(model.parameters()), None))
    got, entropies = made.token_log_probs(model, ids, mask, entropy=True)
    log_softmax = plain_model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    kept = targets != -100
    wanted = log_softmax.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept
    wanted_entropies = -(log_softmax.exp() * log_softmax).sum(-1) * kept
    assert entropies is not None
    distances = [(got - wanted).abs().max().item(), (entropies - wanted_entropies).abs().max().item()]
    (wanted.sum() / kept.sum() + wanted_entropies.mean()).backward()
    norm = float(nn.utils.clip_grad_norm_(plain_model.parameters(), 1e9))
    made.backward(got.sum() / kept.sum() + entropies.mean(), model, optimizer)
    result = made.optimizer_step(optimizer, model, boundary=True)
    return [*distances, abs((result.grad_norm or 0.0) / norm - 1)]


def after_an_interruption(made: StrategyBase) -> float:
    """By how much log-probabilities are off after a forward pass that Ctrl-C interrupted, of another kind of batch."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ranks, model = made.sequence_parallel, made.prepare(built("plain"))
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        log_probs(model, ranks.split(batch(2, 0)))
    except KeyboardInterrupt:
        handle.remove()
    whole = batch(0, 0)
    with torch.no_grad():
        found, wanted = ranks.gather(log_probs(model, ranks.split(whole))), log_probs(built("plain"), whole)
    return float((found - wanted).abs().max())


def used_in_another_order(made: StrategyBase) -> list[bool]:
    """Two batches that are split at first, of 11 and 12 tokens: slices of the same shape."""
    ranks, model = made.sequence_parallel, made.prepare(llama())
    batches = [batch(0, 0), batch(1, 0)]
    locals_ = [ranks.split(full_batch) for full_batch in batches]
    with torch.no_grad():
        values = [ranks.gather(log_probs(model, local)) for local in locals_]
        wanted = [log_probs(model, full_batch) for full_batch in batches]
    return [bool(torch.allclose(got, right, atol=1e-5)) for got, right in zip(values, wanted, strict=True)]


def shared_prompts(made: StrategyBase) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Completions of the same prompts on all ranks, with how many this rank's engine made; and of other prompts on each rank."""
    actor = llama()
    optimizer = torch.optim.AdamW(actor.parameters())
    actor, optimizer, _ = made.prepare((actor, optimizer, None))
    engine: Any = made.setup_inference_engine(made.config, "fake", actor=actor)
    counts, generate = [], engine.generate

    def counting(prompts: Any, sampling: Any) -> Any:
        counts.append(len(prompts))
        return generate(prompts, sampling)

    engine.generate = counting
    settings = {"max_tokens": 3, "temperature": 0.0, "n": 2}
    same = made.gather_and_generate(settings, all_prompt_token_ids=[[1, 5], [2, 6, 7], [3]])
    apart = made.gather_and_generate(settings, all_prompt_token_ids=[[4 + made.get_rank()], [9]])
    return (
        [list(completion.prompt_token_ids) for completion in same],
        counts,
        [list(completion.prompt_token_ids) for completion in apart],
    )
