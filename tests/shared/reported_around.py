"""What users of training libraries have reported: saving, loading, averaging, building and generating around the updates.

On every strategy, each gives the result of plain torch, transformers or PEFT, or is refused by name. Every rank runs `outcomes`.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import opened
from llamas import FusedLoss, llama
from programs import tokens
from safetensors.torch import load_file

from lightrft.config import LightRFTError
from lightrft.strategy import StrategyBase

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

RIGHT = "right"
PROMPTS = [[5, 6, 7, 8], [3, 4]]


@dataclass(kw_only=True)
class Script:
    """What a case needs: strategies of one kind, the ranks, and a directory that they share."""

    open: Callable[[], Any]
    """Makes a strategy, a context manager."""
    ranks: int
    folder: Path


def loss_of(model: Any, update: int, rank: int) -> torch.Tensor:
    inputs_BT = tokens(update, rank)
    loss: torch.Tensor = model(input_ids=inputs_BT, labels=inputs_BT).loss
    return loss


def prepared(
    made: StrategyBase, model: Any, make: Callable[[Any], torch.optim.Optimizer] | None = None
) -> tuple[Any, Any]:
    return made.prepare((model, optimizer := (make or sgd)(model), None))[0], optimizer


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def train(made: StrategyBase, model: Any, optimizer: Any, updates: range) -> None:
    for update in updates:
        made.backward(loss_of(model, update, made.get_rank()), model, optimizer)
        made.optimizer_step(optimizer, model)


def train_plainly(model: Any, optimizer: torch.optim.Optimizer, updates: range, ranks: int) -> None:
    for update in updates:
        optimizer.zero_grad()
        for rank in range(ranks):
            (loss_of(model, update, rank) / ranks).backward()
        optimizer.step()


def weights(made: StrategyBase, model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in made.full_parameters(model) for name, tensor in bucket}


def compare(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Compare all weights. The second name of a tied one, which state_dict has and files leave out, may be on one side."""
    both = found.keys() & wanted.keys()
    for side in (found, wanted):
        tied = {name for name in side.keys() - both for other in both if torch.equal(side[name], side[other])}
        if odd := side.keys() - both - tied:
            return f"on one side alone: {', '.join(sorted(odd))}"
    try:
        for name in both:
            torch.testing.assert_close(found[name].float(), wanted[name].float(), rtol=0, atol=1e-5)
    except AssertionError as error:
        return f"{name}: {error}"
    return RIGHT


# Adapters


def with_adapter(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return peft.get_peft_model(llama(tied=False), config)


def _merged(config: Callable[[], Any]) -> Callable[[Script], str]:
    def run_case(script: Script) -> str:
        plain = with_adapter(config())
        train_plainly(plain, sgd(plain), range(2), script.ranks)
        with script.open() as made:
            model, optimizer = prepared(made, with_adapter(config()))
            train(made, model, optimizer, range(2))
            made.save_model(model, None, script.folder, merge_adapters=True, dtype=torch.float32)
            merged = transformers.AutoModelForCausalLM.from_pretrained(script.folder)
            made.sync_and_clear_cache()
        return compare(merged.state_dict(), plain.merge_and_unload().state_dict())

    return run_case


def _for_an_engine(config: Callable[[], Any]) -> Callable[[Script], str]:
    def run_case(script: Script) -> str:
        with script.open() as made:
            model, _ = prepared(made, with_adapter(config()))
            made.setup_inference_engine(made.config, "fake", actor=model)
        return "nothing was raised"

    return run_case


def _virtual_tokens(kind: Any) -> Any:
    shape = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 4}
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **shape)


# Generation settings


def _set_on_the_adapted_model(script: Script) -> str:
    with script.open() as made:
        model, _ = prepared(made, with_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2)))
        model.config.eos_token_id = None
        model.generation_config = transformers.GenerationConfig(eos_token_id=[9, 11], pad_token_id=3)
        made.setup_inference_engine(made.config, "fake", actor=model)
        ends = made.inference_engine.eos_token_ids
        made.save_model(model, None, script.folder, merge_adapters=True)
        exported = transformers.GenerationConfig.from_pretrained(script.folder)
        made.sync_and_clear_cache()
    found = (sorted(ends), exported.eos_token_id, exported.pad_token_id)
    return RIGHT if found == ([9, 11], [9, 11], 3) else f"{found}"


# Saving in the model's own ways


def _own_way(save: Callable[[Any, Path], object], part: str = "") -> Callable[[Script], str]:
    def run_case(script: Script) -> str:
        with script.open() as made:
            model, _ = prepared(made, llama(tied=False))
            save(model.get_submodule(part), script.folder / str(made.get_rank()))
            if not made.is_rank_0():  # transformers writes on the first rank alone
                return RIGHT
            found = load_file(script.folder / "0" / "model.safetensors")
        return compare(found, llama(tied=False).get_submodule(part).state_dict())

    return run_case


# Fused losses


def _fused_loss(script: Script) -> str:
    plain = FusedLoss()
    train_plainly(plain, sgd(plain), range(2), script.ranks)
    with script.open() as made:
        model, optimizer = prepared(made, FusedLoss())
        train(made, model, optimizer, range(2))
        return compare(weights(made, model), plain.model.state_dict())


# Optimizers


class OwnCount(torch.optim.AdamW):
    """Counts steps in Python, as several subclasses of torch's optimizers do, and has something for later among its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                if not (state := self.state[parameter]):
                    state |= {"step": 0, "is_warm": False, "mean": torch.zeros_like(parameter), "correction": None}
                state["mean"].lerp_(parameter.grad, 0.1)
                state["step"] += 1
                factor = 1.0 if state["correction"] is None and state["is_warm"] is (state["step"] > 1) else 100.0
                parameter.add_(state["mean"], alpha=-0.1 * factor / (1 - 0.9 ** state["step"]))
                state["is_warm"] = True


def _resumed(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Script], str]:
    def run_case(script: Script) -> str:
        plain = llama()
        train_plainly(plain, make(plain), range(3), script.ranks)
        with script.open() as made:
            model, optimizer = prepared(made, llama(), make)
            train(made, model, optimizer, range(2))
            made.save_ckpt(model, script.folder, tag="t")
        with script.open() as made:
            model, optimizer = prepared(made, llama(), make)
            made.load_ckpt(model, script.folder)
            train(made, model, optimizer, range(2, 3))
            return compare(weights(made, model), plain.state_dict())

    return run_case


# Building on the meta device


def _built(build: Callable[[StrategyBase, Script], Any], tied: bool = False) -> Callable[[Script], str]:
    """Build a model in some way, train it, and load another as usual."""

    def run_case(script: Script) -> str:
        plain = llama(tied)
        with script.open() as made:
            if made.is_rank_0():
                plain.save_pretrained(script.folder)
            made.sync_and_clear_cache()
            model, optimizer = prepared(made, build(made, script))
            train(made, model, optimizer, range(2))
            found = weights(made, model)
            again = transformers.AutoModelForCausalLM.from_pretrained(script.folder).state_dict()
        unchanged = compare(again, plain.state_dict())
        train_plainly(plain, sgd(plain), range(2), script.ranks)
        trained = compare(found, plain.state_dict())
        return RIGHT if trained == unchanged == RIGHT else f"{trained}, and a model loaded later: {unchanged}"

    return run_case


def _within_each_other(made: StrategyBase, script: Script) -> Any:
    with made.init_model_context(meta_init=True):
        with made.init_model_context(meta_init=True):
            transformers.LlamaForCausalLM.from_pretrained(script.folder)
        return transformers.LlamaForCausalLM.from_pretrained(script.folder)


def _with_calls_within(made: StrategyBase, script: Script) -> Any:
    with made.init_model_context(meta_init=True):
        assert made.all_reduce(made.get_rank() + 1, "sum") == sum(range(1, script.ranks + 1))
        model = transformers.LlamaForCausalLM.from_pretrained(script.folder)
        assert made.all_gather(torch.ones(1, device="cpu")).tolist() == [1.0] * script.ranks
    return model


def _after_an_error(made: StrategyBase, script: Script) -> Any:
    missing = (OSError, ValueError)  # the second of transformers 4, from huggingface_hub
    with pytest.raises(missing), made.init_model_context(meta_init=True):
        transformers.LlamaForCausalLM.from_pretrained(script.folder / "missing")
    return _within_each_other(made, script)


# Averages


def _averages(script: Script) -> str:
    """One from the beginning, one that is asked every second time, one made after two updates; the fourth update is skipped."""
    plain, wanted = llama(), [llama(), llama()]
    optimizer = sgd(plain)
    with script.open() as made:
        averages = [made.prepare(llama()), made.prepare(llama())]
        model, trained = prepared(made, llama())
        for update in range(5):
            applied = update != 3
            if update == 2:
                averages.append(made.prepare(_copy_of(made, model)))
                wanted.append(copy.deepcopy(plain))
            loss = loss_of(model, update, made.get_rank())
            made.backward(loss if applied else loss * float("nan"), model, trained)
            made.optimizer_step(trained, model)
            if applied:
                train_plainly(plain, optimizer, range(update, update + 1), script.ranks)
            for index, (average, expected) in enumerate(zip(averages, wanted, strict=True)):
                if index != 1 or update % 2:
                    made.moving_average(model, average, 0.5)
                if (applied and index != 1) or (
                    index == 1 and update % 2
                ):  # the second has not seen the third update yet
                    _move(expected, plain)
        found = [
            compare(weights(made, average), model.state_dict()) for average, model in zip(averages, wanted, strict=True)
        ]
    return RIGHT if set(found) == {RIGHT} else f"{found}"


def _copy_of(made: StrategyBase, model: Any) -> Any:
    made_of = llama()
    made_of.load_state_dict(weights(made, model), strict=False)  # without the tied head
    return made_of


@torch.no_grad()
def _move(average: Any, model: Any) -> None:
    for target, parameter in zip(average.parameters(), model.parameters(), strict=True):
        target.lerp_(parameter, 0.5)


def _average_resumed(script: Script) -> str:
    """The average has not seen the last update when both are saved."""
    plain, optimizer, wanted = (model := llama()), sgd(model), llama()
    with script.open() as made:
        average = made.prepare(llama())
        model, trained = prepared(made, llama())
        train(made, model, trained, range(1))
        made.moving_average(model, average, 0.5)
        train(made, model, trained, range(1, 2))
        made.save_ckpt({"model": model, "average": average}, script.folder, tag="t")
    with script.open() as made:
        average = made.prepare(llama())
        model, trained = prepared(made, llama())
        made.load_ckpt({"model": model, "average": average}, script.folder)
        for _ in range(2):
            made.moving_average(model, average, 0.5)
        found = weights(made, average)
    for update in range(2):
        train_plainly(plain, optimizer, range(update, update + 1), script.ranks)
        _move(wanted, plain)
    return compare(found, wanted.state_dict())


@dataclass(kw_only=True)
class Case:
    """What a script does, and where it is refused."""

    script: Callable[[Script], str]
    refused: Mapping[str, str] = field(default_factory=dict)
    """By strategy: words of the refusal. "all": on every strategy."""


_SHARDED = dict.fromkeys(("fsdp", "zero3"), "strategy.save_model")
_NOTHING_TO_MERGE = {"all": "which changes no weight of the base model"}
_PROJECTIONS = ["q_proj", "v_proj"]
CASES = {
    "IA3 merged": Case(script=_merged(lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ))),
    "LoKr merged": Case(script=_merged(lambda: peft.LoKrConfig(target_modules=_PROJECTIONS, r=2, init_weights=False))),
    "a head among adapters merged": Case(script=_merged(lambda: peft.LoraConfig(
        target_modules=_PROJECTIONS, r=2, init_lora_weights=False, modules_to_save=["lm_head"]
    ))),
    "prompt tuning for an engine": Case(
        script=_for_an_engine(lambda: _virtual_tokens(peft.PromptTuningConfig)), refused=_NOTHING_TO_MERGE
    ),
    "p-tuning for an engine": Case(
        script=_for_an_engine(lambda: _virtual_tokens(peft.PromptEncoderConfig)), refused=_NOTHING_TO_MERGE
    ),
    "generation settings of a model with adapters": Case(script=_set_on_the_adapted_model),
    "save_pretrained of a part": Case(script=_own_way(lambda model, path: model.save_pretrained(path), "model"), refused=_SHARDED),
    "save_pretrained of a state": Case(
        script=_own_way(lambda model, path: model.save_pretrained(path, state_dict=model.state_dict())), refused=_SHARDED
    ),
    "a loss that uses the weight of the head": Case(script=_fused_loss),
    "a subclass of AdamW with its own state": Case(script=_resumed(lambda model: OwnCount(model.parameters(), lr=0.1))),
    "AMSGrad": Case(script=_resumed(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True))),
    "meta_init within meta_init": Case(script=_built(_within_each_other)),
    "calls within meta_init": Case(script=_built(_with_calls_within, tied=True)),
    "meta_init after an error in it": Case(script=_built(_after_an_error)),
    "several averages": Case(script=_averages),
    "an average resumed": Case(script=_average_resumed),
}  # fmt: skip


def outcomes(strategy: str, path: str, **settings: Any) -> dict[str, str]:
    """By case: whether it is right, or the error.

    Args:
        strategy: Its name.
        path: A directory that all ranks share.
        **settings: Settings of the strategy.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))

    def run(number: int, case: Case) -> str:
        folder = Path(path) / str(number)
        try:
            return case.script(
                Script(open=lambda: opened(strategy, max_norm=None, **settings), ranks=ranks, folder=folder)
            )
        except LightRFTError as error:
            return f"{type(error).__name__}: {error}"

    return {name: run(number, case) for number, (name, case) in enumerate(CASES.items())}


def unexpected_outcomes(results: Mapping[str, str], strategy: str) -> Iterator[str]:
    """The cases of ``results`` that are neither right nor refused as they should be on ``strategy``."""
    for name, case in CASES.items():
        words = case.refused.get("all") or case.refused.get(strategy)
        if (words is None and results[name] != RIGHT) or (words is not None and words not in results[name]):
            yield f"{name}: {results[name]}"
