"""Judges one column of docs/peers.json. It imports none of the libraries: the processes that it starts do."""

import re
import time

from examples.peers.results import COLUMNS

from lightrft.conformance.peers import Result, judge

MISSING_PACKAGE = re.compile(r"raised (ModuleNotFoundError|PackageNotFoundError)")


def judged(name: str, promises: list[str]) -> list[dict[str, str]]:
    """The results of one column; of each message, the first line: stacks name paths of this machine."""
    start = time.monotonic()

    def on_result(result: Result) -> None:
        line = f"{time.monotonic() - start:4.0f} s  {name:18}{result.verdict:13}{result.promise:22}{result.detail}"
        print(line.splitlines()[0][:300], flush=True)
        if MISSING_PACKAGE.search(result.detail):
            raise SystemExit(f"{name}: {result.promise} was not judged: {result.detail}. Install what is missing")

    results = judge(COLUMNS[name].target, world=COLUMNS[name].world, only=promises, on_result=on_result)
    return [{**result.to_dict(), "detail": result.detail.partition("\n")[0]} for result in results]
