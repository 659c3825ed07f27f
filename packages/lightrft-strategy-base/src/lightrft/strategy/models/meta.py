"""Models on ranks that receive their weights from rank 0: built on the meta device, without reading any weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from lightrft.strategy.models.transformers_patches import META_LOADING, check, loading_on_meta


@contextmanager
def weights_on_rank_0(rank: int) -> Iterator[None]:
    """Build models in the body: on rank 0 as usual, elsewhere on the meta device, without reading any weights.

    Args:
        rank: The rank of this process.

    Raises:
        StrategyError: The installed transformers lacks what is patched on ranks other than 0; raised on every rank.
    """
    uses_transformers = "transformers" in sys.modules
    if uses_transformers:
        check("init_model_context(meta_init=True)", META_LOADING)
    if rank == 0:
        yield
        return
    with torch.device("meta"), loading_on_meta() if uses_transformers else nullcontext():
        yield
