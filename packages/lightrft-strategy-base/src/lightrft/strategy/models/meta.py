"""Models on ranks that receive their weights from rank 0: built on the meta device, without reading any weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightrft.config import LightRFTError, StrategyError
from lightrft.strategy.models import transformers_4, transformers_patches


@contextmanager
def weights_on_rank_0(rank: int) -> Iterator[None]:
    """Build models in the body: on rank 0 as usual, on other ranks on the meta device, without reading any weights.

    Args:
        rank: The rank of this process.

    Raises:
        StrategyError: The installed transformers lacks what is patched on ranks other than 0; raised on every rank. Or
            a constructor reads the values of tensors.
    """
    version = transformers_4 if transformers_patches.is_version_4() else transformers_patches
    patches = version.META_LOADING if "transformers" in sys.modules else ()
    transformers_patches.check("init_model_context(meta_init=True)", patches)
    if rank == 0:
        yield
        return
    with _explaining(), torch.device("meta"), transformers_patches.applied(patches):
        yield


@contextmanager
def _explaining() -> Iterator[None]:
    """Explain what torch raises for code that reads values of tensors on the meta device."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, LightRFTError) or "meta" not in str(error):
            raise
        raise StrategyError(
            f"init_model_context(meta_init=True): expected constructors that read no values of tensors, which only rank 0 "
            f"has, got an error: {error}. Make such tensors with device='cpu', or build the model "
            f"without meta_init"
        ) from error
