"""Models of layers, whose rows do not divide among the ranks."""

import torch
from torch import nn

ROWS = 13


class Layer(nn.Module):
    """Residual; its last parameter has a single row, of which all ranks but one have none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ROWS)
        self.down = nn.Linear(ROWS, width, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, states_BTC: torch.Tensor) -> torch.Tensor:
        update_BTC: torch.Tensor = self.down(torch.tanh(self.up(self.norm(states_BTC)))) * self.scale
        return states_BTC + update_BTC


class Layered(nn.Module):
    """A language model with a tied head, a frozen part and two buffers; ``detour`` uses a layer of its own."""

    _no_split_modules = ["Layer"]
    offset: torch.Tensor
    unsaved: torch.Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width)
        self.layers = nn.ModuleList([Layer(width), Layer(width)])
        self.detour = Layer(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, 17, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.linspace(0, 1, width))
        self.register_buffer("unsaved", torch.linspace(1, 2, width), persistent=False)

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        states_BTC = self.embed(tokens_BT)
        for layer in self.layers:
            states_BTC = layer(states_BTC)
        if detour:
            states_BTC = self.detour(states_BTC)
        states_BTC = self.frozen(states_BTC) * self.unsaved.to(states_BTC.dtype) + self.offset.to(states_BTC.dtype)
        logits_BTV: torch.Tensor = self.head(states_BTC)
        return logits_BTV


def layered(seed: int = 3) -> Layered:
    """A `Layered`, the same for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Layered()


class RoutedLayer(nn.Module):
    """Residual, with two experts, of which a forward pass uses one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    def forward(self, states_BTC: torch.Tensor, expert: int) -> torch.Tensor:
        update_BTC: torch.Tensor = torch.tanh(self.experts[expert](self.norm(states_BTC)))
        return states_BTC + update_BTC


class Routed(nn.Module):
    """A language model that chooses experts by the first token of a batch; ``detour`` uses its vision layer."""

    _no_split_modules = ["RoutedLayer"]

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width)
        self.layers = nn.ModuleList([RoutedLayer(width), RoutedLayer(width)])
        self.visual = RoutedLayer(width)
        self.head = nn.Linear(width, 17, bias=False)

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        states_BTC = self.embed(tokens_BT)
        for layer in [*self.layers, self.visual] if detour else self.layers:
            states_BTC = layer(states_BTC, int(tokens_BT[0, 0]) % 2)
        logits_BTV: torch.Tensor = self.head(states_BTC)
        return logits_BTV


def routed(seed: int = 3) -> Routed:
    """A `Routed`, the same for each seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Routed()
