"""Seeds of requests."""

import itertools

import numpy as np
import pytest
import torch

from lightrft.engines.seeds import completion_seed
from lightrft.strategy.engine import Prompt, Sampling

Image = pytest.importorskip("PIL.Image")

SEEDED = Sampling(seed=1, n=2)


def picture(value: int) -> object:
    return Image.fromarray(np.full((2, 2, 3), value, dtype=np.uint8))


def test_a_seed_depends_on_sampling_seed_prompt_and_sample() -> None:
    prompts = [
        Prompt(token_ids=(1, 2)), Prompt(token_ids=(1,)), Prompt(text="a"), Prompt(text="a", images=(picture(1),)),
        Prompt(text="a", images=(picture(2),)), Prompt(text="a", videos=([picture(1), picture(2)],)),
        Prompt(text="a", images=(np.zeros((2, 2, 3)),)), Prompt(text="a", videos=("a path.mp4",)),
        Prompt(text="a", audios=((np.zeros(4), 16000),)), Prompt(text="a", audios=((np.ones(4), 16000),)),
    ]  # fmt: skip
    samplings = [SEEDED, Sampling(seed=2)]
    seeds = [completion_seed(*arguments) for arguments in itertools.product(prompts, samplings, range(3))]
    assert len(set(seeds)) == len(seeds) == 60
    assert seeds == [completion_seed(*arguments) for arguments in itertools.product(prompts, samplings, range(3))]
    assert all(seed is not None and 0 <= seed < 2**62 for seed in seeds)


def test_media_that_only_the_engine_can_read_are_accepted() -> None:
    unreadable = Prompt(text="a", images=({"url": "somewhere"}, torch.zeros(1, device="meta")), videos=([[1], [2, 3]],))
    assert completion_seed(unreadable, SEEDED) is not None


def test_without_a_sampling_seed_there_is_no_seed() -> None:
    assert completion_seed(Prompt(text="a"), Sampling()) is None
    assert completion_seed(Prompt(text="a"), Sampling(seed=1, temperature=0.0)) is None
