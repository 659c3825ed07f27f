"""What a rank does in the tests of LightRFT's exchange of heads and positions."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightrft.config import ArgumentError
from lightrft.strategy import StrategyBase
from lightrft.strategy.utils.distributed_util import gather_inputs_object_for_inference
from lightrft.strategy.utils.parallel_utils import (
    _SeqAllToAll,
    get_sequence_parallel_group,
    get_sequence_parallel_world_size,
)


class TwoRanks(StrategyBase):
    """Two ranks that share a sequence."""

    name = "two"
    sequence_parallel = SimpleNamespace(group=None)


def there_and_back():
    """On each rank: heads and positions before and after, and their gradients."""
    with TwoRanks() as strategy:
        strategy.sequence_parallel.group = dist.group.WORLD
        group = get_sequence_parallel_group()
        assert (group, get_sequence_parallel_world_size()) == (dist.group.WORLD, 2)
        rank = dist.get_rank()
        whole_BHSD = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
        local_BHSD = whole_BHSD[:, :, 3 * rank : 3 * rank + 3].clone().requires_grad_()
        heads_BHSD, doubled_BHSD = _SeqAllToAll.apply(group, [1, 1], [2, 2], local_BHSD, 2 * local_BHSD)
        assert torch.equal(heads_BHSD, whole_BHSD[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(doubled_BHSD, 2 * heads_BHSD)
        back_BHSD = _SeqAllToAll.apply(group, 2, 1, heads_BHSD)
        assert torch.equal(back_BHSD, local_BHSD)
        assert torch.equal(_SeqAllToAll.apply(group, -2, -3, heads_BHSD), local_BHSD)
        weights_BHSD = torch.randn(whole_BHSD.shape, generator=torch.Generator().manual_seed(1))
        (heads_BHSD * weights_BHSD[:, 2 * rank : 2 * rank + 2]).sum().backward()
        assert torch.equal(local_BHSD.grad, weights_BHSD[:, :, 3 * rank : 3 * rank + 3])
        assert gather_inputs_object_for_inference([{"rank": rank}] * (rank + 1), group) == [
            {"rank": 0}, {"rank": 1}, {"rank": 1}
        ]  # fmt: skip
        with pytest.raises(ArgumentError, match=r"dimension 1 to be a multiple of the group's 2 ranks.*\(1, 3, 2\)"):
            _SeqAllToAll.apply(group, 1, 2, torch.zeros(1, 3, 2))
