"""Seeds of requests."""

import itertools

import numpy as np
import pytest
import torch

from lightrft.engines.seeds import seed_of
from lightrft.strategy import Prompt, Sampling

Image = pytest.importorskip("PIL.Image")

SEEDED = Sampling(seed=1, n=2)


def picture(value: int) -> object:
    return Image.fromarray(np.full((2, 2, 3), value, dtype=np.uint8))


def test_it_follows_from_the_seed_the_prompt_and_the_sample() -> None:
    prompts = [
        Prompt(token_ids=(1, 2)), Prompt(token_ids=(1,)), Prompt(text="a"), Prompt(text="a", images=(picture(1),)),
        Prompt(text="a", images=(picture(2),)), Prompt(text="a", videos=([picture(1), picture(2)],)),
        Prompt(text="a", images=(np.zeros((2, 2, 3)),)), Prompt(text="a", videos=("a path.mp4",)),
    ]  # fmt: skip
    samplings = [SEEDED, Sampling(seed=2)]
    found = [seed_of(*it) for it in itertools.product(prompts, samplings, range(3))]
    assert len(set(found)) == len(found) == 48
    assert found == [seed_of(*it) for it in itertools.product(prompts, samplings, range(3))]
    assert all(it is not None and 0 <= it < 2**62 for it in found)


def test_media_that_only_the_engine_knows_are_no_error() -> None:
    strange = Prompt(text="a", images=({"url": "somewhere"}, torch.zeros(1, device="meta")), videos=([[1], [2, 3]],))
    assert seed_of(strange, SEEDED) is not None


def test_without_a_seed_there_is_none() -> None:
    assert seed_of(Prompt(text="a"), Sampling()) is None
    assert seed_of(Prompt(text="a"), Sampling(seed=1, temperature=0.0)) is None
