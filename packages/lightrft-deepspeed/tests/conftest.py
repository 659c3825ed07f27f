"""Groups of processes, started once."""

import torch
import torch._dynamo  # sets an environment variable when an optimizer first needs it; now, and not in a test
from workers import one, two

__all__ = ["one", "two"]

torch.set_num_threads(1)  # as in the workers: sums depend on it
