"""JSON lines: one object per `log`, appended to ``metrics.jsonl``.

::

    {"step": 3, "time": 1767225600.0, "model/loss": 0.25, "reward": "NaN"}

JSON has no number for NaN and infinity: they are the strings "NaN", "Infinity" and "-Infinity", which ``float`` reads. Lines
are atomic: an incomplete line that a full disk or a killed process left is removed, so that every line can be read.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from lightrft.strategy.telemetry.trackers.tracker import RunInfo

FILE_NAME = "metrics.jsonl"


class JsonLines:
    """Appends to ``metrics.jsonl`` in the directory of the run; after each `log`, the operating system has the line."""

    def __init__(self) -> None:
        self._file: int | None = None

    def start(self, run: RunInfo) -> None:
        """Open the file, and remove a line at its end that was not completed."""
        directory = run.directory or Path()
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, _end_of_last_line(self._file))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line; if it cannot be written, the file stays as it was."""
        assert self._file is not None
        values = {name: _json_value(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": time.time(), **values}, ensure_ascii=False, allow_nan=False)
        data = f"{line}\n".encode(errors="backslashreplace")
        size = os.fstat(self._file).st_size
        try:
            _write_all(self._file, data)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _json_value(value: float) -> float | str:
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _end_of_last_line(file: int, block: int = 65536) -> int:
    """Return the size of ``file`` up to its last newline, which is included."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - block)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
