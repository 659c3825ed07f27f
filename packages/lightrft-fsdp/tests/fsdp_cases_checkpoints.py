"""What a rank does in `test_fsdp_checkpoints`."""

from typing import Any
from unittest.mock import patch

import fsdp_cases
import pytest
from programs import Program

from lightrft.config import CheckpointError, LightRFTError
from lightrft.strategy.checkpoint import capture, saving


def failing(step: str, path: str) -> str:
    """What a rank is told where ``step`` of a save in the background fails on rank 1."""

    def fails(*_: Any) -> None:
        raise CheckpointError("no memory")

    steps = {
        "comparing": (capture, "_prints"),
        "sharing": (saving, "_check_covered"),
        "copying": (saving.Saving, "detached"),
    }
    with fsdp_cases.strategy(Program(), async_ckpt=True, timeout=10.0) as made:
        model, _ = fsdp_cases.prepared(made)
        replaced = patch.object(*steps[step], fails if made.get_rank() else getattr(*steps[step]))
        with replaced, pytest.raises(LightRFTError) as caught:
            made.save_ckpt(model, path)
        made.save_ckpt(model, path)  # nobody was left waiting
        return str(caught.value)
