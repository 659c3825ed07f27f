"""Internals of torch that FSDP2's backend uses: one that is missing is an error as the backend is made."""

import re

import fsdp_cases_patches as cases
import pytest
from removal import remove
from workers import Workers

from lightrft.config import StrategyError
from lightrft.fsdp import patches
from lightrft.strategy.patching import Target


@pytest.mark.parametrize("target", patches.USED, ids=lambda target: target.target.rpartition(":")[2])
def test_a_missing_internal_is_an_error(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(target, patches.USED, monkeypatch)
    with pytest.raises(StrategyError) as caught:
        patches.require_fsdp.__wrapped__()
    missing = re.escape(target.target.replace(":", "."))
    assert re.match(
        rf"strategy 'fsdp' expected torch>=2\.11, got torch \S+, where {missing} does not exist", str(caught.value)
    )


def test_a_backend_checks_the_internals(two: Workers) -> None:
    assert two.run(cases.times_checked) == [1, 1]


def test_without_the_patch_of_muon_only_muon_is_refused(two: Workers) -> None:
    for adamw_applied, muon in two.run(cases.without_the_patch_of_muon):
        assert adamw_applied
        assert muon.startswith("prepare: expected an optimizer"), muon
        assert "Muon" in muon
