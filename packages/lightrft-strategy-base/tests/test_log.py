"""`log`: what it accepts, and what it writes."""

import math
import resource
import time

import numpy as np
import pytest
import torch
from logged_training import lines, strategy, trained, update
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, BackendNotInstalledError, ConfigError, StrategyError
from lightrft.strategy.telemetry.metrics import flatten, on_host
from lightrft.strategy.telemetry.phases import PhaseTimer


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
def test_metrics_that_are_not_numbers_by_name_are_refused(metrics, message):
    with strategy() as made, pytest.raises(ArgumentTypeError, match=f"^log: .*{message}"):
        made.log(metrics, 0)


@pytest.mark.parametrize("metrics", [{"a/b": 1, "a": {"b": 2}}, {"step": 1}, {"time": 1}])
def test_a_reserved_or_repeated_name_is_refused(metrics):
    with strategy() as made, pytest.raises(ArgumentError, match="log: expected each metric to have its own name"):
        made.log(metrics, 0)


@pytest.mark.parametrize(
    ("step", "error"),
    [(-1, ArgumentError), (1.0, ArgumentTypeError), (True, ArgumentTypeError), (None, ArgumentTypeError)],
)
def test_a_step_that_is_not_an_integer_of_at_least_0_is_refused(step, error):
    with strategy() as made, pytest.raises(error, match="log: expected step to be an integer of at least 0, got"):
        made.log({}, step)


def test_a_closed_strategy_refuses_to_log():
    made = strategy()
    made.close()
    with pytest.raises(StrategyError, match="log: expected an open strategy"):
        made.log({}, 0)


def test_log_without_a_destination_warns_once(caplog):
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
    with pytest.raises(ConfigError, match="expected a subclass of Tracker"):
        strategy(trackers=["pathlib:Path"])
    with pytest.raises(BackendNotInstalledError, match="tracker 'pathlib:No'"):
        strategy(trackers=["pathlib:No"])


def test_json_lines_hold_steps_that_repeat_and_values_that_are_not_finite(tmp_path):
    with strategy(log_dir=str(tmp_path / "made")) as made:
        made.log({"a": 2**60, "b": math.nan, "c": math.inf, "ä": -math.inf}, 3)
        made.log({"a": 0.1}, np.int64(3))
        first, second = lines(tmp_path / "made")  # complete before the strategy is closed
    assert (first["step"], first["a"], first["b"], first["c"], first["ä"]) == (3, 2**60, "NaN", "Infinity", "-Infinity")
    assert (second["step"], second["a"]) == (3, 0.1)
    assert time.time() - 100 < first["time"] <= second["time"]
    assert float(first["c"]) == math.inf


def test_a_run_that_resumes_appends_and_drops_an_incomplete_line(tmp_path):
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


def test_the_metrics_of_several_models_have_different_names(tmp_path):
    with strategy(log_dir=str(tmp_path)) as made:
        for name in ("actor", "critic", "critic"):
            model, optimizer = trained(made)
            made.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
            made.optimizer_step(optimizer, model, name=name, boundary=True)
        made.log({}, 1)
    assert {"actor/loss", "critic/loss", "critic_2/loss"} <= lines(tmp_path)[0].keys()


def test_rollouts_are_counted_with_their_staleness(tmp_path):
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
