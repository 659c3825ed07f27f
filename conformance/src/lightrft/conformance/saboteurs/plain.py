"""Plain, correct data-parallel training, as a base for saboteurs that need more than one rank."""

from lightrft.strategy import StrategyBase


class PlainStrategy(StrategyBase):
    """`ReplicatedBackend` unchanged: each rank has the full model, and gradients are averaged once per update."""

    name = "plain"
