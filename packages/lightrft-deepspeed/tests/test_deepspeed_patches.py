"""Patches of DeepSpeed: a target that it dropped is an error, and a closed strategy leaves DeepSpeed as it was."""

import re

import ds_cases_patches as cases
import pytest
from workers import Workers

from lightrft.strategy.patching import Patch

PATCHES = [target for target in cases.TARGETS if isinstance(target, Patch)]


def test_a_missing_patch_target_is_an_error_when_the_backend_is_created(one: Workers) -> None:
    (messages,) = one.run(cases.message_without_each_target)
    assert messages.keys() == {target.target for target in cases.TARGETS}
    for name, message in messages.items():
        lack = re.escape(name.replace(":", "."))
        assert re.search(
            rf"^strategy 'deepspeed' expected deepspeed>=0\.19\.8, got deepspeed [\d.+\w]+, where {lack} does "
            rf"not exist\. Install a supported version: pip install",
            message,
        )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_every_patch_says_why_where_and_until_when(patch: Patch) -> None:
    assert patch.why
    assert patch.until
    assert patch.versions == "0.19.8"
    assert re.match(
        r"https://github\.com/(deepspeedai/DeepSpeed|pytorch/pytorch)/(issues/|pull/|blob/v0\.19\.8/.+#L)\d+",
        patch.upstream,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_strategy_leaves_deepspeeds_globals_as_they_were(one: Workers, stage: int) -> None:
    ((during, after),) = one.run(cases.changed_globals, stage=stage)
    assert {"cdb", "_WORLD_GROUP", "FWD_MODULE_STACK"} <= set(during)
    assert ("linear" in during) == (stage == 3)
    assert after == []


def test_a_constructor_that_fails_half_way_frees_everything(one: Workers) -> None:
    assert one.run(cases.failing_half_way) == [("no group", [])]
    one.run(cases.changed_globals, stage=2)  # a new lifetime is sound


def test_a_strategy_that_fails_after_its_backend_was_created_frees_everything(two: Workers) -> None:
    for message, left in two.run(cases.failing_after_the_backend_was_made):
        assert message.startswith("train_batch_size=3 is not a multiple of")
        assert left == []


@pytest.mark.parametrize(
    ("stage", "methods"), [(0, []), (1, []), (2, ["_backward_epilogue"]), (3, ["get_grad_norm_direct"])]
)
def test_patches_of_one_model_end_with_the_strategy(two: Workers, stage: int, methods: list[str]) -> None:
    assert two.run(cases.patched_objects, stage=stage) == [(methods, [])] * 2


def test_deepspeed_is_checked_once_in_a_process(one: Workers) -> None:
    assert one.run(cases.times_checked) == [1]


def test_no_barrier_of_deepspeed_holds_a_process_group(one: Workers) -> None:
    assert one.run(cases.default_groups) == [[]]
