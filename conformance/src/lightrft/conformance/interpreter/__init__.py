"""Runs programs on a strategy, in a worker. Each operation returns an observation or the error it raised."""

from lightrft.conformance.interpreter.run import run_program

__all__ = ["run_program"]
