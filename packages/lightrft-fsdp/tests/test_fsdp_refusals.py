"""Mistakes: the same error on every rank, with what was asked, what was found, and what to do."""

import fsdp_cases_refusals as cases
import pytest
import torch
from workers import Workers

WORDS = {
    "unknown strategy": ("ConfigError", "there is no strategy 'fdsp'", "did you mean 'fsdp'?", "registered names: "),
    "batch that does not divide": ("ConfigError", "train_batch_size=3", "1 x 2 = 2", "the same number"),
    "no CUDA": ("ConfigError", "device='cuda'", "got none", "Use device='cpu' or 'auto'"),
    "unknown engine": ("ConfigError", "there is no engine 'transformer'", "did you mean 'transformers'?"),
    "generating without an engine": ("EngineError", "gather_and_generate", "setup_inference_engine"),
    "replicas that do not divide": ("ConfigError", "shard_size to divide the 2 ranks, got 3"),
    "no layers": ("UnsupportedOperationError", "Linear has no layers to wrap", "Set _no_split_modules ="),
    "scalar parameter": ("UnsupportedOperationError", "temperature of Layered", "Give them shape (1,)"),
    "optimizer of another model": ("StrategyError", "got that of another model (Layered)", "that prepare returned"),
    "loss without a graph": ("StrategyError", "backward: expected a loss with a graph", "detached"),
    "model that was not prepared": ("StrategyError", "which this strategy has not prepared", "Call prepare("),
    "optimizer of whole matrices": ("StrategyError", "prepare: expected an optimizer", "Adafactor", "torch.optim.Muon"),
    "sparse gradient": ("UnsupportedOperationError", "backward: expected dense gradients of _Lookup", "sparse=False"),
    "batch norm in bf16": ("UnsupportedOperationError", "prepare: expected no BatchNorm", "got extra of", "bf16=False"),
    "step without backward": ("StrategyError", "optimizer_step: expected a backward", "Call strategy.backward("),
}


def test_an_interrupted_rank_does_not_continue_with_the_other_ranks(two: Workers) -> None:
    (kind, *calls), other = two.run(cases.left_by_one_rank)
    assert kind == "KeyboardInterrupt"
    assert ["was interrupted by KeyboardInterrupt" in message for message in calls] == [True, True]
    assert len(other) == 1


@pytest.mark.parametrize("what", cases.MISTAKES)
def test_a_mistake_is_explained_on_every_rank(two: Workers, what: str) -> None:
    if what == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    kind, *words = WORDS[what]
    first, second = two.run(cases.refused, what=what)
    assert first == second
    assert first[0] == kind
    assert [word for word in words if word not in first[1]] == [], first[1]
