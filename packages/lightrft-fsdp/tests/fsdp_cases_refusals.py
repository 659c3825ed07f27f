"""What a rank does in `test_fsdp_refusals`: mistakes that people make, one by one."""

from collections.abc import Callable

import fsdp_cases
import torch
from fsdp_models import layered
from programs import Program, loss_of, tokens
from torch import nn

from lightrft.config import LightRFTError, StrategyError
from lightrft.fsdp import FSDPV2Strategy
from lightrft.strategy import get_strategy

CPU = {"strategy": "fsdp", "device": "cpu", "train_batch_size": 2}


def refused(what: str) -> tuple[str, str]:
    """The kind of error, and its message."""
    try:
        MISTAKES[what]()
    except LightRFTError as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{what}: nothing was raised")


def left_by_one_rank() -> list[str]:
    """What each rank is told after rank 0 was interrupted in a call, and goes on."""
    told: list[str] = []
    with fsdp_cases.strategy(Program(), timeout=5.0) as made:
        try:
            with made._consensus.together("sample"):
                if made.get_rank() == 0:
                    raise KeyboardInterrupt
        except (KeyboardInterrupt, RuntimeError, LightRFTError) as error:
            told.append(type(error).__name__)
        if made.get_rank() == 0:
            for call in (lambda: made.all_reduce(1.0), lambda: made.gather_and_generate({}, [[1]])):
                try:
                    call()
                except StrategyError as error:
                    told.append(str(error))
    return told


def _settings(**given: object) -> Callable[[], None]:
    return lambda: get_strategy({**CPU, **given}).close()


def _with_strategy(mistake: Callable[[FSDPV2Strategy], object]) -> Callable[[], None]:
    def run() -> None:
        with fsdp_cases.strategy(Program()) as made:
            mistake(made)

    return run


def _optimizer_of_another_model(made: FSDPV2Strategy) -> None:
    model, _ = fsdp_cases.prepared(made)
    _, other = fsdp_cases.prepared(made)
    made.backward(loss_of(model, tokens(0)), model, other)


def _loss_without_a_graph(made: FSDPV2Strategy) -> None:
    model, optimizer = fsdp_cases.prepared(made)
    made.backward(loss_of(model, tokens(0)).detach(), model, optimizer)


def _model_that_was_not_prepared(made: FSDPV2Strategy) -> None:
    model = layered()
    optimizer = made.create_optimizer(model, lr=1e-3)
    made.backward(loss_of(model, tokens(0)), model, optimizer)


def _scalar_parameter(made: FSDPV2Strategy) -> None:
    model = layered()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    made.prepare(model)


def _optimizer_of_whole_matrices(made: FSDPV2Strategy) -> None:
    model = layered()
    made.prepare((model, torch.optim.Adafactor(model.parameters(), lr=0.0), None))


class _Lookup(nn.Module):
    """Makes sparse gradients by a functional embedding, which preparing cannot see."""

    _no_split_modules = ["Embedding"]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(4, 2), nn.Parameter(torch.ones(4, 2))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return (self.embed(indices) + nn.functional.embedding(indices, self.table, sparse=True)).sum()


def _sparse_gradient(made: FSDPV2Strategy) -> None:
    model, optimizer = fsdp_cases.prepared(made, _Lookup())
    made.backward(model(torch.tensor([1, 2])), model, optimizer)


def _batch_norm_in_bf16() -> None:
    with fsdp_cases.strategy(Program(), bf16=True) as made:
        model = layered()
        model.extra = nn.BatchNorm1d(4)
        made.prepare(model)


def _step_without_backward(made: FSDPV2Strategy) -> None:
    model, optimizer = fsdp_cases.prepared(made)
    made.optimizer_step(optimizer, model)


MISTAKES: dict[str, Callable[[], None]] = {
    "unknown strategy": _settings(strategy="fdsp"),
    "batch that does not divide": _settings(train_batch_size=3),
    "no CUDA": _settings(device="cuda"),
    "unknown engine": _with_strategy(lambda made: made.setup_inference_engine(made.config, "transformer")),
    "generating without an engine": _with_strategy(lambda made: made.gather_and_generate({}, [[1]])),
    "replicas that do not divide": _with_strategy(lambda made: made.prepare_model(layered(), shard_size=3)),
    "no layers": _with_strategy(lambda made: made.prepare(nn.Linear(2, 2))),
    "scalar parameter": _with_strategy(_scalar_parameter),
    "optimizer of another model": _with_strategy(_optimizer_of_another_model),
    "loss without a graph": _with_strategy(_loss_without_a_graph),
    "model that was not prepared": _with_strategy(_model_that_was_not_prepared),
    "optimizer of whole matrices": _with_strategy(_optimizer_of_whole_matrices),
    "sparse gradient": _with_strategy(_sparse_gradient),
    "batch norm in bf16": _batch_norm_in_bf16,
    "step without backward": _with_strategy(_step_without_backward),
}
