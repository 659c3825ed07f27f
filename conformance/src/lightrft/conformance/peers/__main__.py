"""``python -m lightrft.conformance.peers MODULE:ATTRIBUTE [PROMISE ...]`` judges a training loop."""

import argparse
import json
import time
from pathlib import Path

from lightrft.conformance.peers.judge import Result, judge
from lightrft.conformance.peers.registry import PROMISES


def main() -> None:
    """Judge what the command line names, and print a line for each promise."""
    parser = argparse.ArgumentParser(prog="python -m lightrft.conformance.peers", description=__doc__)
    parser.add_argument(
        "target", help="module:attribute, imported from the current directory or from what is installed"
    )
    parser.add_argument("promises", nargs="*", metavar="PROMISE", help=f"default: all of {', '.join(PROMISES)}")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--report", type=Path, help="write the results as JSON")
    options = parser.parse_intermixed_args()
    if unknown := set(options.promises) - PROMISES.keys():
        parser.error(f"unknown promises: {', '.join(sorted(unknown))}")
    start = time.monotonic()

    def on_result(result: Result) -> None:
        print(f"{result.verdict:12}{result.promise:24}{result.detail} {result.link}".rstrip(), flush=True)

    results = judge(options.target, world=options.world_size, only=options.promises, on_result=on_result)
    print(f"{len(results)} promises in {time.monotonic() - start:.0f} s")
    if options.report:
        options.report.write_text(json.dumps([result.to_dict() for result in results], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
