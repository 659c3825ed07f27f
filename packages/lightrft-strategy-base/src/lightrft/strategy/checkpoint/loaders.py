"""The loaders that `setup_dataloader` made, and the positions in a checkpoint that wait for theirs.

A checkpoint has the positions of the loaders that were alive, in the order in which they were made; in this order
they are given back, to loaders that are there when it is loaded, and then to those that are made afterwards.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from lightrft.config import CheckpointError
from lightrft.strategy.training.data import ResumableLoader

Position = dict[str, Any]
"""JSON values: where a loader stands, and what its samples depend on."""


class Loaders:
    """The loaders of one strategy."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[ResumableLoader]] = []
        self._waiting: list[Position] = []

    @property
    def _living(self) -> list[ResumableLoader]:
        return [loader for it in self._made if (loader := it()) is not None]

    def add(self, loader: ResumableLoader) -> None:
        """Save the position of ``loader`` as long as it lives; it goes to the next one that waits, unless it was sent
        elsewhere. Raises `CheckpointError` where that one is of another loader."""
        if self._waiting:
            _check(loader, self._waiting[0], len(self._living))
            position = self._waiting.pop(0)
            if not loader.consumed_samples:
                loader.load_state_dict(position)
        self._made.append(weakref.ref(loader))

    def positions(self) -> list[Position]:
        """For a checkpoint."""
        return [{**it.order(), **it.state_dict()} for it in self._living] + self._waiting

    def check(self, positions: Sequence[Position]) -> None:
        """Raise `CheckpointError` where one is of another loader than the one that would get it."""
        for index, (loader, position) in enumerate(zip(self._living, positions, strict=False)):
            _check(loader, position, index)

    def restore(self, positions: Sequence[Position]) -> None:
        """Go to ``positions``, which were checked."""
        living = self._living
        for loader, position in zip(living, positions, strict=False):
            loader.load_state_dict(position)
        self._waiting = list(positions[len(living) :])


def _check(loader: ResumableLoader, position: Position, index: int) -> None:
    here = loader.order()
    if position["ranks"] != here["ranks"]:  # then the size of a rank's batch may be another too
        here = {name: value for name, value in here.items() if name not in ("ranks", "batch_size")}
    differing = [name for name, value in here.items() if value != position[name]]
    if differing:
        now, before = (", ".join(f"{name}={it[name]}" for name in differing) for it in (here, position))
        raise CheckpointError(
            f"loader {index} that setup_dataloader made has {now}, and the one whose position is in the checkpoint had "
            f"{before}; make the loaders in the same order from the same data, or pass load_module_only=True to load_ckpt"
        )
