"""Groups of processes, started once."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo  # sets an environment variable when an optimizer first needs it; now, and not in a test
from ds_workers import Workers

torch.set_num_threads(1)  # as in the workers: sums depend on it


@pytest.fixture(scope="session")
def one() -> Iterator[Workers]:
    """A world of one rank."""
    workers = Workers(1)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Workers]:
    """A world of two ranks."""
    workers = Workers(2)
    yield workers
    workers.stop()
