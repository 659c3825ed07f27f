"""Trackers of other libraries write what was logged."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from logged_training import strategy

from lightrft.strategy.telemetry.trackers import Tracker
from lightrft.strategy.telemetry.trackers.jsonl import JsonLines


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    with strategy(log_dir=str(tmp_path), trackers=["tensorboard"]) as made:
        made.log({"reward": {"mean": 0.5}}, 1)
        made.log({"reward": {"mean": math.nan}}, 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("reward/mean")
    assert [event.step for event in events] == [1, 1]
    assert events[0].value == 0.5 and math.isnan(events[1].value)


def _run_alone(code: str, **variables: str) -> str:
    """Run ``code`` in a process of its own, because the library leaves threads, signal handlers and children behind."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


LOG_TWICE = """
from lightrft.strategy import get_fake_strategy
with get_fake_strategy(log_dir={folder!r}, trackers=[{name!r}], log_project="trial", log_name="first") as made:
    made.log({{"reward": 0.5}}, 5)
    made.log({{"reward": float("nan")}}, 4)
"""


def test_wandb_writes_offline(tmp_path):
    pytest.importorskip("wandb", reason="needs wandb")
    output = _run_alone(LOG_TWICE.format(folder=str(tmp_path), name="wandb"), WANDB_MODE="offline", WANDB_SILENT="true")
    assert "tracker 'wandb'" not in output
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [(step, str(reward)) for step, reward in _wandb_history(written)] == [(5, "0.5"), (4, "nan")]


def _wandb_history(path: Path) -> list[tuple[int, Any]]:
    """What a run's file holds. It has the format of LevelDB's log: blocks of 32 KiB, of records that may be in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, history, payload = path.read_bytes(), [], b""
    position = 7  # after the file's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        size, part = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        payload += data[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):  # a whole record, or its last part
            record = Record.FromString(payload)
            payload = b""
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                history.append((json.loads(items["step"]), json.loads(items["reward"])))
    return history


def test_trackio_writes_to_its_database(tmp_path):
    pytest.importorskip("trackio", reason="needs trackio")
    code = LOG_TWICE.format(folder=str(tmp_path / "run"), name="trackio")
    output = _run_alone(code, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    assert "tracker 'trackio'" not in output
    with closing(sqlite3.connect(tmp_path / "trackio/trial.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    entries = [(name, step, str(json.loads(metrics)["reward"]).lower()) for name, step, metrics in rows]
    assert entries == [("first", 5, "0.5"), ("first", 4, "nan")]


def test_json_lines_is_a_tracker():
    assert issubclass(JsonLines, Tracker)
