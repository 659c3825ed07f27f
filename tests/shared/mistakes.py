"""Mistakes that users make, on any strategy: each error message has the call, what it expected, what it got, and a remedy.

Every rank runs `error_messages`.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from exports import opened
from reported import Small, loss_of, small
from torch import nn
from torch.utils.data import IterableDataset

from lightrft.config import LightRFTError, StrategyConfig
from lightrft.strategy import StrategyBase, get_strategy


class Script:
    """A script that is about to make a mistake: a strategy with a model in training."""

    def __init__(self, made: StrategyBase, path: str) -> None:
        self.made, self.path = made, path
        self.model, self.optimizer, _ = made.prepare(_triple(small()))

    @property
    def loss(self) -> torch.Tensor:
        return loss_of(self.model, 0, self.made.get_rank())

    def backward(self, loss: Any = None, **more: Any) -> None:
        self.made.backward(self.loss if loss is None else loss, self.model, self.optimizer, **more)

    def step(self, *more: Any, **options: Any) -> object:
        return self.made.optimizer_step(self.optimizer, self.model, *more, **options)

    def sequence(self, *calls: Callable[[], object]) -> None:
        for call in calls:
            call()


def _triple(model: Any) -> tuple[Any, Any, None]:
    return model, torch.optim.SGD(model.parameters(), lr=0.1), None


def _with_attribute(**attributes: Any) -> Small:
    model = small()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class _Actor(nn.Module):
    is_actor = True

    def __init__(self) -> None:
        super().__init__()
        self.model, self.value_head = small(), nn.Linear(8, 1)


class BytesPath(os.PathLike[bytes]):
    """A path as os.scandir(b".") yields it."""

    def __fspath__(self) -> bytes:
        return b"run"


SETTINGS: Mapping[str, Callable[[], object]] = {
    "a misspelled setting": lambda: get_strategy({"zero_stag": 3}),
    "a word for a number": lambda: get_strategy({"zero_stage": "three"}),
    "a strategy that does not exist": lambda: get_strategy({"strategy": "fdsp"}),
    "an empty micro-batch": lambda: get_strategy({"strategy": "fake", "micro_train_batch_size": 0}),
    "a batch that does not divide": lambda: get_strategy(
        {"strategy": "fake", "train_batch_size": 3, "micro_train_batch_size": 2}
    ),
    "a norm below 0": lambda: get_strategy({"strategy": "fake", "max_norm": -1}),
    "a file that is missing": lambda: StrategyConfig.from_yaml("no/such/run.yaml"),
    "a file with a byte 0 in its name": lambda: StrategyConfig.from_yaml("run\0.yaml"),
    "a file with a character that no name can have": lambda: StrategyConfig.from_yaml("run\ud800.yaml"),
    "a file whose path is bytes": lambda: StrategyConfig.from_yaml(BytesPath()),  # type: ignore[arg-type]
    "logs in a home that is missing": lambda: get_strategy(
        {"strategy": "fake", "log_dir": "~nobody-has-this-name/logs"}
    ),
    "an option of another strategy": lambda: get_strategy(StrategyConfig(strategy="fake", grad_accum_dtype="bf16")),
    "ranks that do not share an engine": lambda: get_strategy({"strategy": "fake", "engine_tp_size": 2}),
    "ranks that do not share a sequence": lambda: get_strategy({"strategy": "fake", "sp_size": 2}),
}
"""Those of `get_strategy` and of files, on one process."""

CALLS: Mapping[str, Callable[[Script], object]] = {
    # preparing
    "three arguments": lambda script: script.made.prepare(*_triple(small())),
    "the name of a model": lambda script: script.made.prepare("org/model"),
    "the optimizer of a copy": lambda script: script.made.prepare((small(), _triple(small())[1], None)),
    "prepared again": lambda script: script.made.prepare((script.model, script.optimizer, None)),
    "prepared for inference too": lambda script: script.made.prepare(script.model),
    "a second optimizer": lambda script: script.made.create_optimizer(script.model, lr=0.1),
    "an optimizer that evaluates": lambda script: script.made.prepare(
        (model := small(), torch.optim.LBFGS(model.parameters()), None)
    ),
    "a lock in the model": lambda script: script.made.prepare(_triple(_with_attribute(lock=threading.Lock()))),
    "a graph in the model": lambda script: script.made.prepare(_triple(_with_attribute(last=torch.ones(1, requires_grad=True) * 2))),
    "complex parameters": lambda script: script.made.prepare(
        _triple(_with_attribute(phase=nn.Parameter(torch.zeros(2, dtype=torch.complex64))))
    ),
    "sparse embeddings": lambda script: script.made.prepare(_triple(_with_attribute(extra=nn.Embedding(2, 2, sparse=True)))),
    "a head outside of the actor's model": lambda script: script.made.prepare(_triple(_Actor())),
    "a backbone of two models": lambda script: script.made.prepare(_with_attribute(embed=script.model.embed)),
    # an update
    "losses that are not reduced": lambda script: script.backward(script.model(torch.zeros(1, 2).long())),
    "a loss that was detached": lambda script: script.backward(script.loss.detach()),
    "a loss as a number": lambda script: script.backward(script.loss.item()),
    "the loss of another model": lambda script: script.backward(torch.ones(1, requires_grad=True).sum()),
    "a model that was not prepared": lambda script: script.made.backward(script.loss, small(), script.optimizer),
    "model and optimizer swapped": lambda script: script.made.backward(script.loss, script.optimizer, script.model),  # type: ignore[arg-type]
    "no backward": lambda script: script.step(),
    "a direct step": lambda script: script.sequence(script.backward, script.optimizer.step),
    "zero_grad in an update": lambda script: script.sequence(script.backward, script.optimizer.zero_grad),
    "a group that is added later": lambda script: script.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "the scheduler of another optimizer": lambda script: script.sequence(
        script.backward,
        lambda: script.step(torch.optim.lr_scheduler.ExponentialLR(_triple(small())[1], 0.9)),
    ),
    "a negative denominator": lambda script: script.sequence(lambda: script.backward(denominator=-1), script.step),
    "a denominator that is text": lambda script: script.sequence(lambda: script.backward(denominator="many"), script.step),
    "a denominator for one loss of two": lambda script: script.sequence(
        script.backward, lambda: script.backward(denominator=3), script.step
    ),
    "a boundary that is text": lambda script: script.sequence(script.backward, lambda: script.step(boundary="last")),
    "an average and its model swapped": lambda script: script.made.moving_average(script.made.prepare(small()), script.model),
    # around it
    "a seed that is text": lambda script: script.made.set_seed("42"),  # type: ignore[arg-type]
    "an operation that does not exist": lambda script: script.made.all_reduce(1.0, "average"),  # type: ignore[call-overload]
    "the mean of integers": lambda script: script.made.all_reduce(torch.ones(2, dtype=torch.long)),
    "a list to gather": lambda script: script.made.all_gather([1, 2]),  # type: ignore[call-overload]
    "a dataset without a length": lambda script: script.made.setup_dataloader(_Stream(), 1),
    "a sequence above the budget": lambda script: script.made.plan_micro_batches([9], max_tokens=8, padded=True),
    "directory and model swapped": lambda script: script.made.save_ckpt(script.path, script.model),  # type: ignore[arg-type]
    "a checkpoint within an update": lambda script: script.sequence(script.backward, lambda: script.made.save_ckpt(script.model, script.path)),
    "a variable for a directory that was not set": lambda script: script.made.save_ckpt(script.model, ""),
    "a directory with a byte 0 in its name": lambda script: script.made.load_ckpt(script.model, "run\0"),
    "a directory with a character that no name can have": lambda script: script.made.load_ckpt(script.model, "run\ud800"),
    "a directory whose path is bytes": lambda script: script.made.save_ckpt(script.model, BytesPath()),  # type: ignore[arg-type]
    "a directory with a name that is too long": lambda script: script.made.save_model(script.model, None, f"{script.path}/{'n' * 256}"),
    "a home that is missing": lambda script: script.made.load_model(script.model, "~nobody-has-this-name/model"),
    "a tag that is a path": lambda script: script.made.save_ckpt(script.model, script.path, tag="a/b"),
    "a checkpoint that is missing": lambda script: script.made.load_ckpt(script.model, os.path.join(script.path, "none")),
    "a tokenizer by its name": lambda script: script.made.save_model(script.model, "tokenizer", script.path),
    "a model by its name": lambda script: script.made.load_model(script.model, "org/model"),
    # rollouts
    "no engine": lambda script: script.made.gather_and_generate({"max_tokens": 1}, [[1]]),
    "an engine that does not exist": lambda script: script.made.setup_inference_engine(None, "vlm", actor=script.model),
    "an actor that was not prepared": lambda script: script.made.setup_inference_engine(None, "fake", actor=small()),
    "a misspelled sampling parameter": lambda script: script.sequence(
        lambda: script.made.setup_inference_engine(None, "fake", actor=script.model),
        lambda: script.made.gather_and_generate({"max_token": 1}, [[1]]),
    ),
    "text for token ids": lambda script: script.made.gather_and_generate({"max_tokens": 1}, ["a prompt"]),
    "an empty prompt": lambda script: script.made.gather_and_generate({"max_tokens": 1}, [[]]),
}  # fmt: skip
"""By name, in this order, in one lifetime of a strategy."""


def error_messages(strategy: str, path: str, **settings: Any) -> dict[str, str]:
    """The error of each of `CALLS`."""
    with opened(strategy, **settings) as made:
        return {name: error_of(lambda call=call: call(Script(made, path))) for name, call in CALLS.items()}  # type: ignore[misc]


def error_of(mistake: Callable[[], object]) -> str:
    """The error of a mistake, in the form that `incomplete_messages` checks."""
    try:
        mistake()
    except LightRFTError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - a raw error is what this looks for
        return f"raw {type(error).__name__}: {error}"
    return "nothing was raised"


def incomplete_messages(messages: Mapping[str, str]) -> list[str]:
    """The errors that lack the call, what it expected, what it got or a remedy, or that are not this project's."""
    return [f"{name}: {error}" for name, error in messages.items() if missing_parts(error)]


def missing_parts(error: str) -> list[str]:
    """The parts that an error message lacks."""
    kind, _, message = error.partition(": ")
    parts = {
        "an error of this project": not kind.startswith(("raw", "nothing")),
        "the call or the setting": re.match(r"[\w.' =-]+(: |=)|there is no strategy", message) is not None,
        "what it expected": re.search(
            r"expected|cannot read|does not support|did you mean|Did you mean|not a multiple|there is no", message
        )
        is not None,
        "what it got": re.search(r"got |found none|No such|=|'|there is no|shares|does not", message) is not None,
        "what to do": re.search(
            r"[.;?] [A-Z]\w+|[Dd]id you mean|expected [\w ]+ to be |expected (an integer|a number) >", message
        )
        is not None,  # a value of the wrong type needs no more than what it should be
        "brevity": len(message) < 700,
    }
    return [part for part, there in parts.items() if not there]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        results = {name: error_of(mistake) for name, mistake in SETTINGS.items()} | error_messages("fake", folder)
    for number, (name, error) in enumerate(results.items(), 1):
        print(f"{number}. {name}: {error}\n   lacks {missing_parts(error) or 'nothing'}")
