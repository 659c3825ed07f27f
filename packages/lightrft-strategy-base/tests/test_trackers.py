"""A tracker can neither stop nor delay the training; the examples of the page on trackers run."""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from logged_training import lines, strategy, trained
from torch import nn
from tracker_cases import FailsToLog, FailsToStart, Hangs, InMemory

from lightrft.strategy.telemetry import writers
from lightrft.strategy.telemetry.trackers import RunInfo, Tracker
from lightrft.strategy.telemetry.writers import BackgroundWriter

PAGE = Path(__file__).parents[3] / "docs/trackers.md"


def by_path(tracker: type) -> str:
    return f"{tracker.__module__}:{tracker.__name__}"


@pytest.fixture(autouse=True)
def _forget_trackers() -> Iterator[None]:
    yield
    InMemory.instances.clear()


def test_a_tracker_gets_the_run_and_the_metrics_on_a_thread_of_its_own():
    with strategy(trackers=[by_path(InMemory)], log_name="first", extra_args={"use_wandb": "a key"}) as made:
        made.log({"a": torch.tensor(1.5)}, 4)
    (tracker,) = InMemory.instances
    assert isinstance(tracker, Tracker)
    run, (metrics, step, thread), closed = tracker.calls
    assert (run.project, run.name, run.strategy, run.world_size) == ("lightrft", "first", "fake", 1)
    assert run.directory is None and run.settings["train_batch_size"] == 2 and "a key" not in repr(run)
    assert (metrics["a"], step, closed) == (1.5, 4, "closed")
    assert thread.startswith("lightrft-tracker-")


def test_a_tracker_is_not_started_without_metrics():
    with strategy(trackers=[by_path(InMemory)]):
        pass
    assert [tracker.calls for tracker in InMemory.instances] == [[]]


def test_a_tracker_that_fails_is_reported_once_and_the_others_continue(tmp_path, caplog):
    names = [by_path(FailsToStart), by_path(FailsToLog)]
    with caplog.at_level(logging.WARNING), strategy(log_dir=str(tmp_path), trackers=names) as made:
        for step in range(3):
            made.log({"a": 1}, step)
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2
    assert (
        "FailsToLog' failed to log: OSError: disk full. Metrics may be missing there. The training continues"
        in messages[0]
    )
    assert "FailsToStart' could not start: ConnectionError: no network. It gets no metrics in this run" in messages[1]
    fails_to_start, fails_to_log = InMemory.instances
    assert fails_to_start.calls == []
    assert [call[1] for call in fails_to_log.calls[1:-1]] == [0, 1, 2] and fails_to_log.calls[-1] == "closed"
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_tracker_that_hangs_blocks_no_caller(caplog, monkeypatch):
    monkeypatch.setattr(Hangs, "released", threading.Event())
    tracker = Hangs()
    run = RunInfo(project="p", name=None, directory=None, strategy="fake", world_size=1, settings={})
    writer = BackgroundWriter("slow", tracker, run, capacity=2, close_timeout=0.2)
    began = time.monotonic()
    for step in range(10):
        writer.log({"a": step}, step)
    thread = writer._thread
    writer.close()
    assert time.monotonic() - began < 5
    assert [record.getMessage()[:53] for record in caplog.records] == [
        "log: tracker 'slow' is behind by 2 entries. Newer one"
    ]
    Hangs.released.set()
    assert thread is not None
    thread.join(10)
    assert tracker.calls[-1] == "closed", "once it goes on, it ends"
    assert 2 <= len(tracker.calls[1:-1]) <= 3


def test_closing_abandons_a_tracker_that_does_not_finish(caplog, monkeypatch):
    monkeypatch.setattr(Hangs, "released", threading.Event())
    monkeypatch.setattr(writers, "CLOSE_TIMEOUT", 0.2)
    with strategy(trackers=[by_path(Hangs)]) as made:
        made.log({}, 0)
        (writer,) = made._tracking._writers
        monkeypatch.setattr(writer, "_close_timeout", 0.2)
        thread = writer._thread
    assert "did not finish within 0.2 s of close" in caplog.text
    Hangs.released.set()
    thread.join(10)


def test_an_interruption_while_closing_trackers_skips_no_other_cleanup(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    made = strategy()
    model, _ = trained(made)
    assert type(model) is not nn.Linear
    monkeypatch.setattr(made._tracking, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.close()
    assert type(model) is nn.Linear


def test_a_script_that_does_not_close_the_strategy_loses_nothing(tmp_path):
    code = f"""
import time
from lightrft.strategy import get_fake_strategy
class Slow:
    def start(self, run): time.sleep(0.2)
    def log(self, metrics, step): time.sleep(0.1); print(step, flush=True)
    def close(self): print("closed")
import sys; sys.modules["slow"] = sys.modules["__main__"]
made = get_fake_strategy(log_dir={str(tmp_path)!r}, trackers=["slow:Slow"])
for step in range(3): made.log({{}}, step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["0", "1", "2", "closed"], done.stderr
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def page_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_run(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    script, tracker = page_blocks()
    (tmp_path / "my_tracker.py").write_text(tracker)
    (tmp_path / "script.py").write_text(
        script.replace('trackers=["tensorboard"]', 'trackers=["tensorboard", "my_tracker:CSV"]')
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "log: tracker" not in done.stderr
    assert [line["step"] for line in lines(tmp_path / "runs/first")] == list(range(1, 11))
    assert (tmp_path / "runs/first/metrics.csv").read_text().splitlines()[0] == "step,name,value"
    assert done.stdout.split()[-1] == str(lines(tmp_path / "runs/first")[-1]["model/loss"])


def test_the_page_lists_the_metrics_of_the_strategy(tmp_path):
    section = PAGE.read_text(encoding="utf-8").partition("## Metrics of the strategy")[2]
    listed = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    bare = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with strategy(log_dir=str(tmp_path), engine_type="fake") as made:
        model, optimizer, _ = made.prepare((bare, torch.optim.SGD(bare.parameters(), lr=0.25), None))
        made.setup_inference_engine({"pretrain": "none"}, "fake", actor=model)
        made.gather_and_generate({"max_tokens": 3}, [[1], [2, 3]])
        made.backward(model(torch.ones(1, 2, dtype=torch.int64)).sum(), model, optimizer, denominator=2)
        made.optimizer_step(optimizer, model, boundary=True)
        made.save_ckpt(model, tmp_path / "checkpoints")
        made.log({}, 0)
    written = lines(tmp_path)[0].keys() - {"step", "time"}
    assert listed - written == {"memory/device", "memory/device_reserved", "memory/device_used"}
    assert written <= listed
