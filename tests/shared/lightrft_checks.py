"""Checks that the scripts of `lightrft_scripts` give the same results on a package's strategies as on FakeStrategy."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightrft_scripts as scripts
import pytest
import torch
from lightrft_scripts import Outcome, arguments, pretrained
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:get_strategy.*have no effect on the strategy:UserWarning")
SCRIPTS = {
    "PPO": {"enable_ema": True, "pretrain_data": "texts"},
    "GRPO": {"advantage_estimator": "group_norm", "n_samples_per_prompt": 2, "use_kl_loss": True, "meta_init": True, "freeze_prefix": True},
}  # fmt: skip
"""What sets them apart among the arguments."""


def run_here(script: Callable[..., Outcome], **given: Any) -> list[Outcome]:
    """Run a script in this process, on the strategy 'fake'."""
    return [script(**given)]


def run_script(
    run: Callable[..., list[Outcome]], script: str, folder: Path, rollouts: int | None = None, **given: Any
) -> Any:
    """The outcomes of ``colocate`` by rank. ``folder`` gets the pretrained model, and what the script saves."""
    settings = {**SCRIPTS[script], **given}
    if script == "PPO":
        settings["critic_pretrain"] = str(folder / "pretrain")
    return run(scripts.colocate, args=arguments(pretrained(folder), **settings), rollouts=rollouts)


@cache
def run_on_fake_strategy(script: str) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """The outcome of ``colocate`` on FakeStrategy, and the weights that it saves in the end."""
    with TemporaryDirectory() as folder:
        (outcome,) = run_script(run_here, script, Path(folder), strategy="fake")
        return outcome, AutoModelForCausalLM.from_pretrained(f"{folder}/saved").state_dict()


def check_colocate(run: Callable[..., list[Outcome]], script: str, folder: Path, **settings: Any) -> None:
    """The script gives the results of FakeStrategy, resumes in the middle of an epoch, and saves a model that opens."""
    wanted, saved_by_fake = run_on_fake_strategy(script)
    outcomes = run_script(run, script, folder / "whole", **settings)
    run_script(run, script, folder / "parts", rollouts=3, **settings)
    resumed = run_script(run, script, folder / "parts", load_checkpoint=True, **settings)
    assert sorted(prompt for outcome in outcomes for prompt in outcome.prompts) == sorted(scripts.PROMPTS * 2)
    for outcome, rest in zip(outcomes, resumed, strict=True):
        assert outcome.rewards == pytest.approx(wanted.rewards, abs=1e-4)
        assert_close(outcome.weights, wanted.weights, 1e-4)
        assert rest.prompts == outcome.prompts[-len(outcome.prompts) // 4 :]
        assert rest.rewards == pytest.approx(outcome.rewards[3:], abs=1e-6)
        assert rest.status[-1]["actor_lr"] == outcome.status[-1]["actor_lr"]
        assert_close(rest.weights, outcome.weights, 1e-6)
    start = AutoModelForCausalLM.from_pretrained(folder / "whole" / "pretrain").state_dict()
    actor = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoints" / "global_step4_hf").state_dict()
    assert_close({name: actor[name] for name in outcomes[0].weights}, outcomes[0].weights, 0)
    saved = AutoModelForCausalLM.from_pretrained(folder / "whole" / "saved").state_dict()
    assert_close(saved, saved_by_fake, 1e-3)
    if script == "PPO":
        name = "model.norm.weight"
        assert (saved[name] - start[name]).norm() < (actor[name] - start[name]).norm()  # the average lags behind
        critic = scripts.Critic.from_pretrained(folder / "whole" / "saved_critic")
        assert critic.score.weight.std() > 0.1
    else:
        assert all(torch.equal(actor[name], start[name]) == ("layers.0." in name) for name in outcomes[0].weights)


def check_reward_model(run: Callable[..., list[Outcome]], folder: Path, **settings: Any) -> None:
    """The script of a reward model gives the results of FakeStrategy, and saves the model in the wrapper."""
    (wanted,) = run_here(scripts.reward_model, args=arguments(pretrained(folder / "fake"), strategy="fake"))
    for outcome in run(scripts.reward_model, args=arguments(pretrained(folder / "own"), **settings)):
        assert_close(outcome.weights, wanted.weights, 1e-3)
    saved = AutoModelForCausalLM.from_pretrained(folder / "own" / "saved" / "final_checkpoint").state_dict()
    assert_close({name: saved[name] for name in wanted.weights}, wanted.weights, 1e-3)


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    """The same names, and values that differ by at most ``bound``."""
    assert got.keys() == wanted.keys()
    furthest = {name: float((got[name] - tensor).abs().max()) for name, tensor in wanted.items()}
    assert max(furthest.values()) <= bound, furthest
