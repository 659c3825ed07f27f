"""Expected failures: a strict list with reasons. A listed clause that passes or does not exist fails the run.

The file is TOML, with a table for each strategy (a name, or a name with settings: ``deepspeed[zero_stage=0]``)::

    ["deepspeed[zero_stage=0]"]
    "OPT-16" = "the reason, with a link to the upstream issue or documentation"
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightrft.conformance.judge import ClauseResult


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """The clauses that one strategy is expected to fail, with reasons."""

    reasons: Mapping[str, str]

    @classmethod
    def read(cls, path: Path | None, strategy: str, settings: Mapping[str, object]) -> "Expectations":
        """Read the expected failures of ``strategy`` with ``settings``.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not TOML, or does not have the form above.
        """
        if path is None:
            return cls(reasons={})
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, table in tables.items():
            if not isinstance(table, dict) or not all(isinstance(reason, str) for reason in table.values()):
                raise ValueError(f"expected a table of clauses with their reasons, got {name} = {table!r}. Correct it")
            if any("=" not in condition for condition in _conditions(name)):
                raise ValueError(f"expected settings NAME=VALUE in brackets, got {name!r}. Correct it")
        reasons: dict[str, str] = {}
        for name, table in tables.items():
            wanted = dict(condition.split("=", 1) for condition in _conditions(name))
            if name.partition("[")[0] == strategy and all(
                str(settings.get(key)) == value for key, value in wanted.items()
            ):
                reasons.update(table)
        return cls(reasons=reasons)

    def unknown(self, ids: Sequence[str]) -> str:
        """An error message about clauses that do not exist, or an empty string."""
        unknown = sorted(set(self.reasons) - set(ids))
        hint = "`lightrft-conformance clauses` lists those that exist"
        return f"the file of expected failures lists unknown clauses: {', '.join(unknown)}; {hint}" if unknown else ""

    def applied(self, result: ClauseResult) -> ClauseResult:
        """``result``, with the expected failures applied."""
        reason = self.reasons.get(result.id)
        if reason is None or result.verdict in ("skip", "error"):
            return result
        if result.verdict == "pass":
            return replace(
                result, verdict="fail", message=f"expected to fail ({reason}), but it passes: remove it from the list"
            )
        return replace(result, verdict="xfail", message=f"expected: {reason}")


def _conditions(name: str) -> list[str]:
    """The settings in the name of a table."""
    return [condition for condition in name.rstrip("]").partition("[")[2].split(",") if condition]
