"""PREP: preparing models."""

from lightrft.conformance.contract.preparing import (  # noqa: F401 - each module registers its clauses
    arguments,
    own_saving,
    parameters,
    prepared_models,
)
