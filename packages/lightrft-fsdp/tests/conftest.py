"""Groups of processes, started once."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo  # sets an environment variable when an optimizer first needs it; now, and not in a test
from workers import Workers, one, started, two

__all__ = ["one", "two"]

torch.set_num_threads(1)  # as in the workers: sums depend on it


@pytest.fixture(scope="session")
def three() -> Iterator[Workers]:
    """A world of three ranks, among which few shapes divide evenly."""
    yield from started(3)


@pytest.fixture(scope="session")
def four() -> Iterator[Workers]:
    """A world of four ranks."""
    yield from started(4)
