"""Trackers write the metrics of a run. One module each; `Tracker` is their interface, and `RunInfo` describes the run.

A package registers its own tracker under the group ``lightrft.trackers``; the setting ``trackers`` names it.
"""

from lightrft.strategy.telemetry.trackers.tracker import RunInfo, Tracker

__all__ = ["RunInfo", "Tracker"]
