"""Data-parallel training in its plainest form, correct, for saboteurs that need more than one rank."""

from lightrft.strategy import StrategyBase


class PlainStrategy(StrategyBase):
    """`ReplicatedBackend` as it is: each rank has the whole model, and gradients are averaged once an update."""

    name = "plain"
