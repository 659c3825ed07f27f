"""GEN: completions of prompts."""

from lightrft.conformance.contract.generation import (  # noqa: F401 - each module registers its clauses
    completions,
    endings,
    sampling,
)
