"""The command `lightrft-conformance`."""

import sys

from lightrft_cli.adoption import hiding_package


def main() -> None:
    """Run `lightrft.conformance.cli`; exit with code 2 if another package `lightrft` hides it."""
    hidden = hiding_package()
    if hidden is not None:
        print(f"lightrft-conformance: {hidden}", file=sys.stderr)
        sys.exit(2)
    from lightrft.conformance.cli import app

    app()
