"""Promises that any training library may keep, judged one by one through a small Protocol.

The contract (`lightrft.conformance.contract`) is about strategies of this project's API. The promises here are drawn from it,
and worded for any library: an adapter implements `TrainingLoop` with the library's own means, and each promise compares what
the ranks did with plain PyTorch in one process.
"""

from lightrft.conformance.peers.judge import Result, judge
from lightrft.conformance.peers.protocol import LoopSettings, NotOffered, ReduceOp, Target, TrainingLoop, Update

__all__ = ["LoopSettings", "NotOffered", "ReduceOp", "Result", "Target", "TrainingLoop", "Update", "judge"]
