"""PREP: preparing models."""

from lightrft.conformance.contract.preparing import (  # noqa: F401 - each module registers its clauses
    arguments,
    parameters,
    prepared_models,
    save_pretrained,
)
