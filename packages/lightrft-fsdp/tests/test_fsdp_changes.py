"""What a script does to a prepared model between updates means what it means in plain torch."""

from pathlib import Path

import fsdp_cases_changes as cases
import pytest
import torch
from workers import Workers


@pytest.mark.parametrize("script", sorted(cases.SCRIPTS))
def test_a_script_trains_as_in_plain_torch(one: Workers, two: Workers, script: str) -> None:
    for workers in (one, two):
        for norms, wanted, off in workers.run(cases.compared, script=script):
            assert norms == pytest.approx(wanted, rel=1e-4)
            assert off < 1e-5


@pytest.mark.parametrize("hook", sorted(cases.HOOKS))
def test_a_gradient_hook_acts_as_in_plain_torch(two: Workers, hook: str) -> None:
    for norms, wanted, off in two.run(cases.compared, script="updates_alone", micro_batches=2, hook=hook):
        assert norms == pytest.approx(wanted, rel=1e-4)
        assert off < 5e-5


def test_a_hook_sees_full_gradients_and_its_handle_removes_it(two: Workers) -> None:
    assert two.run(cases.removed_by_its_handle) == [[1, 0], [1, 0]]


@pytest.mark.parametrize("after", [False, True])
def test_a_hook_on_the_accumulated_gradient_is_refused_by_name(two: Workers, after: bool) -> None:
    first, second = two.run(cases.accumulated, after=after)
    assert first == second
    assert first[0] == ("StrategyError" if after else "UnsupportedOperationError")
    assert "layers.0.up.weight" in first[1]
    assert "Use register_hook" in first[1]


def test_a_parameter_that_is_frozen_after_the_first_forward_was_refused_stays_frozen(two: Workers) -> None:
    assert two.run(cases.frozen_after_a_refused_forward) == [[True, True], [True, True]]


def test_a_part_that_is_called_alone_is_evaluated_and_does_not_train(two: Workers) -> None:
    for outputs, wanted, errors in two.run(cases.parts):
        torch.testing.assert_close(outputs, wanted)
        assert "expected embed to be called in the forward pass of Layered" in errors["part"]
        assert "expected layers.1.up to be called in the forward pass of Layered" in errors["part of a layer"]
        assert "expected head to be called in the forward pass of Layered" in errors["tied part"]
        assert "Compute penalties over parameters in the model's forward" in errors["penalty"]


def test_a_step_runs_no_hooks_of_parts(two: Workers) -> None:
    assert two.run(cases.hooks_run_in_steps) == [0, 0]


def test_training_continues_after_saving_and_loading_in_inference_mode(two: Workers, tmp_path: Path) -> None:
    assert two.run(cases.saved_and_loaded_in_inference_mode, path=str(tmp_path)) == [0, 0]


def test_values_that_gathering_would_undo_are_refused_by_name(two: Workers) -> None:
    for errors in two.run(cases.written_while_gathered):
        assert len(errors) == 2
        assert all("embed.weight" in error and "strategy.load_model" in error for error in errors)
