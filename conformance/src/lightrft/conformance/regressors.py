"""Regressors, each with something that a strategy may get wrong: frozen or unused parts, buffers, branches, large matrices."""

import torch
from torch import nn

WIDTH = 6
OUTPUTS = 3


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


class KeywordArgument(Regressor):
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


class RunningStatistics(Regressor):
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


class OverflowingGradient(Regressor):
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
    """A regressor whose parameters are all matrices, for Muon."""

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
