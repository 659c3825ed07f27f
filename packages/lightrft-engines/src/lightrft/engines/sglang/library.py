"""The SGLang library: the versions that the adapter supports, and its import."""

from typing import TYPE_CHECKING, cast

from lightrft.engines.engine_library import EngineLibrary
from lightrft.engines.sglang import patches

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

SGLANG = EngineLibrary(engine="sglang", distributions=("sglang",), supported=">=0.5.21,<0.5.24")


def load() -> "type[Engine]":
    """Import SGLang's engine class.

    Raises:
        BackendNotInstalledError: SGLang is not installed, or cannot be imported.
        EngineError: It lacks something that the adapter uses or patches.
    """
    SGLANG.require()
    with SGLANG.importing():
        from sglang.srt.entrypoints.engine import Engine
    SGLANG.require(patches.TARGETS)
    return cast("type[Engine]", Engine)
