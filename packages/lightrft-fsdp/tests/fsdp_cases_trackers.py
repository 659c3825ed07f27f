"""What a rank does in `test_fsdp_trackers`."""

import os

import torch
from fsdp_cases import strategy
from programs import Program
from torch import nn

from lightrft.config import ConfigError, LightRFTError

PROGRAM = Program(accumulation_steps=2, max_norm=None)


class Small(nn.Module):
    _no_split_modules = ["Linear"]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(inputs)
        return output


def losses_of_an_update(folder: str, denominators: list[float | None]) -> list[float | None]:
    """Train on losses 1, 2 on rank 0 and 3, 4 on rank 1, and log on each rank; `StepResult.loss` of each micro-batch."""
    with strategy(PROGRAM, log_dir=folder) as made:
        model: nn.Module = Small()
        model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
        got = []
        for number in range(2):
            output = model(torch.ones(1, 2)).sum()
            loss = output - output.detach() + 1 + number + 2 * made.get_rank()
            made.backward(loss, model, optimizer, denominator=denominators[made.get_rank()])
            got.append(made.optimizer_step(optimizer, model).loss)
        made.log({"rank": made.get_rank(), "loss": loss}, 1)
        if made.is_rank_0():
            made.log({"alone": 1}, 2)  # no other rank is waited for
        return got


def log_under_a_name_of_each_rank(folder: str) -> None:
    """Log in a run whose ranks have other names for it, as those made of the time may be."""
    rank = os.environ["RANK"]
    with strategy(PROGRAM, log_dir=f"{folder}/{rank}", log_name=rank, log_project=rank) as made:
        made.log({}, 0)


def refusals(folder: str) -> list[str]:
    """What this rank says of a metric and of a tracker that cannot be."""
    messages = []
    with strategy(PROGRAM, log_dir=folder) as made:
        try:
            made.log({"reward": "high"}, 0)
        except LightRFTError as error:
            messages.append(str(error))
    try:
        with strategy(PROGRAM, trackers=["nowhere"]):
            pass
    except ConfigError as error:
        messages.append(str(error))
    return messages
