"""`log`: what it accepts, what it writes, and that a tracker can neither stop nor delay the training."""

import json
import logging
import math
import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tracker_cases import FailsToLog, FailsToStart, Hangs, InMemory

from lightrft.config import ArgumentError, ArgumentTypeError, BackendNotInstalledError, ConfigError, StrategyError
from lightrft.strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.telemetry import writers
from lightrft.strategy.telemetry.metrics import flatten, on_host
from lightrft.strategy.telemetry.phases import PhaseTimer
from lightrft.strategy.telemetry.trackers import RunInfo, Tracker
from lightrft.strategy.telemetry.trackers.jsonl import JsonLines
from lightrft.strategy.telemetry.writers import BackgroundWriter

PAGE = Path(__file__).parents[3] / "docs/trackers.md"


def by_path(tracker: type) -> str:
    return f"{tracker.__module__}:{tracker.__name__}"


@pytest.fixture(autouse=True)
def _forget_trackers() -> Iterator[None]:
    yield
    InMemory.instances.clear()


def strategy(**settings: Any) -> FakeStrategy:
    return get_fake_strategy(**{"bf16": False, "train_batch_size": 2, **settings})


def trained(made: FakeStrategy) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=0.25), None))
    return model, optimizer


def update(
    made: FakeStrategy, model: nn.Module, optimizer: torch.optim.Optimizer, *losses: float, norm: float = 1.0
) -> None:
    """One update with these losses, and a gradient of this norm."""
    for index, loss in enumerate(losses, start=1):
        output = norm / math.sqrt(2) * model(torch.ones(1, 2)).sum()
        made.backward(output - output.detach() + loss, model, optimizer)
        made.optimizer_step(optimizer, model, boundary=index == len(losses))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# Arguments


def test_names_are_joined_and_numbers_of_all_kinds_are_read():
    flat = flatten(
        {
            "a": {"b": {"c": 1}, "d": np.float32(0.5)},
            "e": torch.tensor([2]),
            "f": np.int64(3),
            "g": torch.tensor(1.5, requires_grad=True),
        }
    )
    assert on_host(flat) == {"a/b/c": 1, "a/d": 0.5, "e": 2, "f": 3, "g": 1.5}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "expected metrics to be a dict of numbers by name, got None"),
        ([("a", 1)], "expected metrics to be a dict"),
        ({1: 2}, r"expected the name of a metric to be a non-empty string, got int \(1\)"),
        ({"a": {"": 2}}, "non-empty string, got str .* in 'a/'"),
        ({"a": "1"}, r"expected 'a' to be a number or a tensor of one number, got str \('1'\)"),
        ({"a": {"b": None}}, "expected 'a/b' to be a number .* got None. Leave it out"),
        ({"a": True}, r"got bool \(True\). Pass int\(value\)"),
        ({"a": 1j}, "expected 'a' to be a number"),
        ({"a": torch.ones(2)}, r"got a tensor of shape \(2,\), torch.float32 on cpu. Reduce it"),
        ({"a": torch.tensor(True)}, "got a tensor of shape .*torch.bool"),
        ({"a": torch.ones((), device="meta")}, "on meta. Pass a number"),
        ({"a": np.ones(2)}, "got ndarray"),
    ],
)
def test_other_metrics_are_refused(metrics, message):
    with strategy() as made, pytest.raises(ArgumentTypeError, match=f"^log: .*{message}"):
        made.log(metrics, 0)


@pytest.mark.parametrize("metrics", [{"a/b": 1, "a": {"b": 2}}, {"step": 1}, {"time": 1}])
def test_a_name_is_used_once(metrics):
    with strategy() as made, pytest.raises(ArgumentError, match="log: expected each metric to have its own name"):
        made.log(metrics, 0)


@pytest.mark.parametrize(
    ("step", "error"),
    [(-1, ArgumentError), (1.0, ArgumentTypeError), (True, ArgumentTypeError), (None, ArgumentTypeError)],
)
def test_a_step_is_an_integer_of_at_least_0(step, error):
    with strategy() as made, pytest.raises(error, match="log: expected step to be an integer of at least 0, got"):
        made.log({}, step)


def test_a_closed_strategy_does_not_log():
    made = strategy()
    made.close()
    with pytest.raises(StrategyError, match="log: expected an open strategy"):
        made.log({}, 0)


def test_without_log_dir_and_trackers_it_warns_once(caplog):
    with strategy() as made:
        made.log({"a": 1}, 0)
        made.log({"a": 1}, 1)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "log: expected a destination for the metrics"
    ]


def test_unknown_trackers_and_those_without_a_directory_are_refused_at_once():
    with pytest.raises(ConfigError, match="there is no tracker 'wandbb'; did you mean 'wandb'"):
        strategy(trackers=["wandbb"])
    with pytest.raises(ConfigError, match="trackers: 'tensorboard' writes to a directory, but log_dir is None"):
        strategy(trackers=["tensorboard"])
    with pytest.raises(ConfigError, match="is not a subclass of Tracker"):
        strategy(trackers=["pathlib:Path"])
    with pytest.raises(BackendNotInstalledError, match="tracker 'pathlib:No'"):
        strategy(trackers=["pathlib:No"])


# What is written


def test_json_lines_hold_steps_that_repeat_and_values_that_are_not_finite(tmp_path):
    with strategy(log_dir=str(tmp_path / "made")) as made:
        made.log({"a": 2**60, "b": math.nan, "c": math.inf, "ä": -math.inf}, 3)
        made.log({"a": 0.1}, np.int64(3))
        first, second = lines(tmp_path / "made")  # complete before the strategy is closed
    assert (first["step"], first["a"], first["b"], first["c"], first["ä"]) == (3, 2**60, "NaN", "Infinity", "-Infinity")
    assert (second["step"], second["a"]) == (3, 0.1)
    assert time.time() - 100 < first["time"] <= second["time"]
    assert float(first["c"]) == math.inf


def test_a_run_that_resumes_appends_and_drops_half_a_line(tmp_path):
    first_line = '{"step": 0}\n'
    (tmp_path / "metrics.jsonl").write_text(first_line + '{"step": 1, "lo' + "x" * 70_000)
    with strategy(log_dir=str(tmp_path)) as made:
        made.log({}, 1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_a_line_that_does_not_fit_on_the_disk_is_dropped(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with strategy(log_dir=str(tmp_path)) as made:
        made.log({}, 0)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            made.log({}, 1)
            made.log({}, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        made.log({}, 3)
    assert [line["step"] for line in lines(tmp_path)] == [0, 3]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "log: tracker 'jsonl' failed to log: OSError: [Errno 27]" in message
    assert "The training continues" in message


def test_a_directory_that_cannot_be_made_does_not_stop_the_training(tmp_path, caplog):
    (tmp_path / "file").touch()
    with strategy(log_dir=str(tmp_path / "file")) as made:
        made.log({}, 0)
        made.log({}, 1)
    assert len(caplog.records) == 1
    assert "tracker 'jsonl' could not start: FileExistsError" in caplog.text


def test_updates_are_averaged_between_two_calls(tmp_path):
    with strategy(log_dir=str(tmp_path), max_norm=3.0) as made:
        model, optimizer = trained(made)
        update(made, model, optimizer, 1.0, 3.0)
        update(made, model, optimizer, 6.0, norm=5.0)
        update(made, model, optimizer, 1.0, norm=math.nan)
        made.log({}, 2)
        made.log({"model/updates": 7}, 2)
    first, second = lines(tmp_path)
    assert first["model/loss"] == 4.0, "without the update that was skipped"
    assert (first["model/updates"], first["model/skipped"], first["model/learning_rate"]) == (2, 1, 0.25)
    assert first["model/grad_norm"] == pytest.approx((1.0 + 5.0) / 2)
    assert first["model/clipped_fraction"] == 0.5
    assert {"seconds/forward", "seconds/backward", "seconds/step", "memory/host", "memory/host_peak"} <= first.keys()
    assert sum(first[f"seconds/{phase}"] for phase in ("forward", "backward", "step")) <= first["seconds/total"]
    assert "model/loss" not in second and "seconds/forward" not in second
    assert second["model/updates"] == 7, "a metric of the script replaces one of the same name"


@pytest.mark.parametrize("items", [None, 4])
def test_the_loss_of_an_update_is_the_one_that_it_was_made_from(tmp_path, items):
    with strategy(log_dir=str(tmp_path)) as made:
        model, optimizer = trained(made)
        for loss, boundary in [(1.0, False), (3.0, True)]:
            output = model(torch.ones(1, 2)).sum()
            made.backward(output - output.detach() + loss, model, optimizer, denominator=items)
            result = made.optimizer_step(optimizer, model, boundary=boundary)
            assert (result.loss is None) == (not boundary)
        made.log({}, 1)
    assert result.loss == (2.0 if items is None else 0.5)
    (line,) = lines(tmp_path)
    assert line["model/loss"] == result.loss
    assert ("model/tokens_per_second" in line) == (items is not None)


def test_an_update_without_items_has_no_loss():
    with strategy() as made:
        model, optimizer = trained(made)
        made.backward(model(torch.ones(1, 2)).sum() * 0, model, optimizer, denominator=0)
        assert made.optimizer_step(optimizer, model, boundary=True).loss is None


def test_models_are_told_apart(tmp_path):
    with strategy(log_dir=str(tmp_path)) as made:
        for name in ("actor", "critic", "critic"):
            model, optimizer = trained(made)
            made.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
            made.optimizer_step(optimizer, model, name=name, boundary=True)
        made.log({}, 1)
    assert {"actor/loss", "critic/loss", "critic_2/loss"} <= lines(tmp_path)[0].keys()


def test_rollouts_and_staleness(tmp_path):
    bare = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with strategy(log_dir=str(tmp_path), engine_type="fake") as made:
        model, optimizer, _ = made.prepare((bare, torch.optim.SGD(bare.parameters(), lr=0.25), None))
        made.setup_inference_engine({"pretrain": "none"}, "fake", actor=model)
        made.gather_and_generate({"max_tokens": 3}, [[1], [2, 3]])
        made.log({}, 0)
        made.backward(model(torch.ones(1, 2, dtype=torch.int64)).sum(), model, optimizer)
        made.optimizer_step(optimizer, model, boundary=True)
        made.engine_generate_local({"max_tokens": 3}, [[1]])
        made.log({}, 1)
        made.update_engine_weights(model)
        made.gather_and_generate({"max_tokens": 3}, [[1]])
        made.log({}, 2)
    first, second, third = lines(tmp_path)
    assert [line["rollout/staleness"] for line in (first, second, third)] == [0, 1, 0]
    assert [line["rollout/weight_version"] for line in (first, second, third)] == [1, 1, 2]
    assert (first["rollout/completions"], second["rollout/completions"]) == (2, 1)
    assert 1 <= first["rollout/completion_tokens/min"] <= first["rollout/completion_tokens/mean"]
    assert first["rollout/completion_tokens/mean"] <= first["rollout/completion_tokens/max"] <= 3
    assert 0 <= first["rollout/truncated_fraction"] <= 1
    assert first["seconds/generate"] > 0 and first["seconds/sync"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_is_timed_and_read_once():
    timer = PhaseTimer(torch.device("cuda"))
    values = torch.rand(4096, 4096, device="cuda")
    for call in ("forward", "backward", "optimizer_step of actor"):
        began = timer.begin(call)
        assert began is not None
        for _ in range(20):
            values @ values
        timer.end(began)
    timer.take()
    torch.cuda.synchronize()
    late, _ = timer.take()
    assert late["step"] > 0, "what the device had not done at the first take is in the second"
    assert on_host({"a": values[0, 0] * 0 + 2.5, "b": 1, "c": torch.tensor(3, device="cuda")}) == {
        "a": 2.5,
        "b": 1,
        "c": 3,
    }


def test_calls_that_are_in_no_phase_are_not_timed():
    timer = PhaseTimer(torch.device("cpu"))
    assert timer.begin("prepare") is None
    began = timer.begin("optimizer_step of actor")
    assert began is not None
    time.sleep(0.01)
    timer.end(began)
    seconds, window = timer.take()
    assert seconds.keys() == {"step"} and 0.01 <= seconds["step"] <= window
    assert timer.take()[0] == {}


# Trackers of your own


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


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path, caplog):
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
    writer = BackgroundWriter("slow", tracker, run, capacity=2, patience=0.2)
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
    monkeypatch.setattr(writers, "PATIENCE", 0.2)
    with strategy(trackers=[by_path(Hangs)]) as made:
        made.log({}, 0)
        (writer,) = made._tracking._writers
        monkeypatch.setattr(writer, "_patience", 0.2)
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


# Trackers of other libraries


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


# The page


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


def test_the_page_lists_the_metrics_of_the_layer(tmp_path):
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
