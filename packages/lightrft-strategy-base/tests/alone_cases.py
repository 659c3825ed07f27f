"""What a rank does in `test_one_rank_alone`: calls with an argument that is wrong on one rank only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from denominator_cases import Plain
from llamas import llama

from lightrft.config import LightRFTError

WRONG = 1
"""The rank that makes the mistake."""


class Made:
    """A strategy with a model in training, on the rank that makes mistakes or on another."""

    def __init__(self, strategy: Plain) -> None:
        self.strategy, self.is_wrong = strategy, strategy.get_rank() == WRONG
        self.model: Any = llama(tied=False)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self.model, self.optimizer, _ = strategy.prepare((self.model, optimizer, None))

    def either(self, right: Any, wrong: Any) -> Any:
        return wrong if self.is_wrong else right

    def update(self, boundary: Any = None, **wrong: Any) -> bool:
        """Make an update, with arguments of ``optimizer_step`` in place of the right ones on the rank that makes mistakes."""
        tokens_BT = torch.tensor([[5, 6, 7, 8]])
        self.strategy.backward(self.model(tokens_BT, labels=tokens_BT).loss, self.model, self.optimizer)
        arguments = {"optimizer": self.optimizer, "model": self.model, **self.either({}, wrong)}
        return self.strategy.optimizer_step(**arguments, boundary=boundary).applied

    def log_probs(self, **arguments: Any) -> Any:
        return self.strategy.token_log_probs(self.model, torch.tensor([[5, 6, 7, 8]]), **arguments)


def targets(last: int) -> torch.Tensor:
    return torch.tensor([[6, 7, last]])


CALLS: dict[str, Callable[[Made], object]] = {
    "token_log_probs, targets": lambda made: made.log_probs(targets=targets(made.either(8, 99))),
    "token_log_probs, temperature": lambda made: made.log_probs(temperature=made.either(1.0, 0)),
    "token_log_probs, model": lambda made: made.strategy.token_log_probs(
        made.either(made.model, llama()), torch.tensor([[5, 6]])
    ),
    "optimizer_step, boundary": lambda made: made.update(boundary=made.either(True, "yes")),
    "optimizer_step, scheduler": lambda made: made.update(scheduler="cosine"),
    "optimizer_step, scheduler of another optimizer": lambda made: made.update(
        scheduler=torch.optim.lr_scheduler.ConstantLR(_sgd(llama()))
    ),
    "optimizer_step, model": lambda made: made.update(model=llama()),
    "optimizer_step, model and optimizer swapped": lambda made: made.update(model=made.optimizer, optimizer=made.model),
    "optimizer_step, optimizer": lambda made: made.update(optimizer=_sgd(made.model)),
    "create_optimizer": lambda made: made.strategy.create_optimizer(llama(), lr=made.either(0.1, "fast")),
    "prepare": lambda made: made.strategy.prepare(made.either(llama(), "model")),
    "prepare, optimizer": lambda made: made.strategy.prepare((model := llama(), made.either(_sgd(model), "sgd"), None)),
    "prepare, optimizer of another model": lambda made: made.strategy.prepare(
        (model := llama(), _sgd(made.either(model, llama())), None)
    ),
    "prepare_model": lambda made: made.strategy.prepare_model(llama(), shard_size=made.either(-1, 0)),
    "prepare_reward_model": lambda made: made.strategy.prepare_reward_model(llama(), max_steps=made.either(5, 0)),
    "init_model_context": lambda made: made.strategy.init_model_context(made.either(False, "no")).__enter__(),
    "moving_average": lambda made: made.strategy.moving_average(
        made.model, made.strategy.prepare(llama(tied=False)), beta=made.either(0.9, "slow")
    ),
    "offload_model": lambda made: made.strategy.offload_model(made.either([made.model], [llama()])),
    "full_parameters": lambda made: list(made.strategy.full_parameters(made.model, made.either(100, 0))),
    "setup_inference_engine": lambda made: made.strategy.setup_inference_engine(
        None, "fake", actor=made.either(made.model, llama())
    ),
    "update_engine_weights": lambda made: made.strategy.update_engine_weights(made.either(made.model, None)),
    "gather_and_generate": lambda made: made.strategy.gather_and_generate(
        {"max_tokens": 1}, [[1]], sleep_engine=made.either(True, "no")
    ),
}  # fmt: skip


def _sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def errors(what: str, fused: bool = False) -> tuple[str, bool]:
    """The error of a call on this rank, and whether an update follows it."""
    settings = {"bf16": False, "train_batch_size": 2, "timeout": 60.0, "fused_linear_logprob": fused}
    with Plain(device="cpu", **settings) as strategy:
        made = Made(strategy)
        said = "no error"
        try:
            CALLS[what](made)
        except LightRFTError as error:
            said = f"{type(error).__name__}: {error}"
        return said, made.update(boundary=True)


def wrong_argument_within_an_update() -> tuple[str, bool, bool]:
    """The error of an update of two micro-batches, the first with a wrong scheduler on one rank; what it left; the next."""
    with Plain(device="cpu", bf16=False, train_batch_size=4, micro_train_batch_size=1, timeout=60.0) as strategy:
        made = Made(strategy)
        before = [parameter.detach().clone() for parameter in made.model.parameters()]
        made.update(scheduler="cosine")
        said = "no error"
        try:
            made.update()
        except LightRFTError as error:
            said = f"{type(error).__name__}: {error}"
        unchanged = all(map(torch.equal, before, made.model.parameters()))
        return said, unchanged, not made.update() and made.update()


def forward_passes_in_consensus() -> list[bool]:
    """Whether the ranks are exchanging messages during each forward pass of the first call without logits."""
    with Plain(device="cpu", bf16=False, train_batch_size=2, fused_linear_logprob=True) as strategy:
        made, noted = Made(strategy), list[bool]()
        inside, together = [0], strategy._consensus.together

        @contextmanager
        def counted(*arguments: Any, **more: Any) -> Iterator[list[Any]]:
            inside[0] += 1
            try:
                with together(*arguments, **more) as told:
                    yield told
            finally:
                inside[0] -= 1

        strategy._consensus.together = counted  # type: ignore[method-assign]
        made.model.register_forward_pre_hook(lambda *_: noted.append(inside[0] > 0))
        made.log_probs()
        return noted
