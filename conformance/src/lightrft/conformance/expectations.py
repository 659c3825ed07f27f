"""Expected failures: a file with a reason for each, and strict. One that passes, or names no clause, fails the run.

TOML, a table for each strategy (a name, or a name with settings: ``deepspeed[zero_stage=0]``)::

    ["deepspeed[zero_stage=0]"]
    "OPT-16" = "the reason why this cannot be had, and where that is said upstream"
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightrft.conformance.judge import ClauseResult


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """The clauses that one strategy is expected to break, with reasons."""

    reasons: Mapping[str, str]

    @classmethod
    def read(cls, path: Path | None, strategy: str, settings: Mapping[str, Any]) -> "Expectations":
        """Those for ``strategy`` with ``settings``."""
        if path is None:
            return cls(reasons={})
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        reasons: dict[str, str] = {}
        for name, table in tables.items():
            base, _, conditions = name.rstrip("]").partition("[")
            wanted = dict(it.split("=", 1) for it in conditions.split(",") if it)
            if base == strategy and all(str(settings.get(key)) == value for key, value in wanted.items()):
                reasons.update(table)
        return cls(reasons=reasons)

    def unknown(self, ids: Sequence[str]) -> str:
        """What is wrong with the file, or an empty string."""
        strange = sorted(set(self.reasons) - set(ids))
        return f"the file of expected failures names {', '.join(strange)}, which is no clause" if strange else ""

    def applied(self, result: ClauseResult) -> ClauseResult:
        """``result``, where it was expected to fail."""
        reason = self.reasons.get(result.id)
        if reason is None or result.verdict in ("skip", "error"):
            return result
        if result.verdict == "pass":
            return replace(
                result, verdict="fail", message=f"it was expected to fail ({reason}), and holds; take it off the list"
            )
        return replace(result, verdict="xfail", message=f"expected: {reason}")
