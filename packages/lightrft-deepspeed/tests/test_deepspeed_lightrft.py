"""LightRFT's scripts run on DeepSpeed ZeRO as they are written; at stage 3 their models are built under zero.Init."""

from pathlib import Path

import lightrft_checks
import pytest
from workers import Workers

pytestmark = lightrft_checks.pytestmark


@pytest.mark.parametrize("script", lightrft_checks.SCRIPTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_script_that_trains_with_rollouts(two: Workers, tmp_path: Path, stage: int, script: str) -> None:
    lightrft_checks.check_colocate(two.run, script, tmp_path, zero_stage=stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_script_that_trains_a_reward_model(two: Workers, tmp_path: Path, stage: int) -> None:
    lightrft_checks.check_reward_model(two.run, tmp_path, zero_stage=stage)
