"""Running programs on a strategy, in a worker: each operation gives an observation, or the error it raised."""

from lightrft.conformance.interpreter.run import run_program

__all__ = ["run_program"]
