"""Seconds in each phase of training: forward, backward, step, generate, sync, save.

On a CUDA device the host only enqueues the work of a forward or a backward, so its clock says nothing about it. CUDA events
measure it instead: they are recorded on the stream and read later, so nothing waits for them.
"""

import time
from collections import defaultdict, deque

import torch

PHASES = {
    "forward": "forward",
    "token_log_probs": "forward",
    "backward": "backward",
    "optimizer_step": "step",
    "gather_and_generate": "generate",
    "engine_generate_local": "generate",
    "update_engine_weights": "sync",
    "save_ckpt": "save",
    "save_model": "save",
}
"""The phase of each public call; the others are in none."""
ON_DEVICE = frozenset({"forward", "backward", "step"})
"""Phases whose work is on one stream of the device."""

Mark = float | torch.cuda.Event
"""A moment: on the host's clock, or in the stream."""


class PhaseTimer:
    """Adds up the seconds in each phase of this rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._window_began: float | None = None

    def begin(self, call: str) -> tuple[str, Mark] | None:
        """Begin the outermost public ``call``. Returns what `end` needs, None for a call that is in no phase."""
        phase = PHASES.get(call.partition(" ")[0])  # "optimizer_step of actor"
        if phase is None:
            return None
        if self._window_began is None:
            self._window_began = time.monotonic()
        return phase, self._mark(phase)

    def end(self, began: tuple[str, Mark]) -> None:
        """End the call for which `begin` returned ``began``."""
        phase, mark = began
        now = self._mark(phase)
        if isinstance(mark, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._pending.append((phase, mark, now))
            if len(self._pending) > 256:
                self._read()
        elif isinstance(mark, float) and isinstance(now, float):
            self._seconds[phase] += now - mark

    def take(self) -> tuple[dict[str, float], float]:
        """Return the seconds by phase since the last `take`, and all seconds since then or since the first phase.

        Phases that are still running on the device are reported by a later `take`.
        """
        self._read()
        now = time.monotonic()
        window = 0.0 if self._window_began is None else now - self._window_began
        seconds, self._seconds, self._window_began = dict(self._seconds), defaultdict(float), now
        return seconds, window

    def _mark(self, phase: str) -> Mark:
        if self._device.type != "cuda" or phase not in ON_DEVICE:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        """Add up the phases that the device has finished."""
        while self._pending and self._pending[0][2].query():
            phase, began, ended = self._pending.popleft()
            self._seconds[phase] += began.elapsed_time(ended) / 1000
