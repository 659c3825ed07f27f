"""What counts as a lost rank."""

import pytest
import torch.distributed as dist

from lightrft.config import CheckpointError, StrategyError
from lightrft.strategy.distributed.operations import Operations

OF_GLOO = [
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45. GLHF!",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete",
    "Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out connecting",
    "Application timeout caused pair closure",
]


@pytest.mark.parametrize("error", [*map(RuntimeError, OF_GLOO), dist.DistBackendError("NCCL error")], ids=str)
def test_an_error_of_torch_for_a_lost_rank_names_the_call(error):
    waited = "backward: rank 0 of 2 waited for another rank"
    with pytest.raises(StrategyError, match=waited) as caught, Operations(0, 2, 3.0).running("backward"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("cannot write /data/gloo/NCCL: Connection reset by peer"),
        OSError("Broken pipe"),
        RuntimeError("the model zoo at /home/gloo timed out: Timed out waiting"),
    ],
    ids=str,
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, Operations(0, 2, 3.0).running("backward"):
        raise error
    assert caught.value is error
