"""Decoding a batch of left-padded prompts: rows do not affect each other."""

import torch
from llamas import llama

from lightrft.engines.transformers.batch import Batch, Row
from lightrft.strategy.engine import Sampling, random_key

PROMPTS = [[1, 5, 9], [4], [1, 2, 3, 4, 5, 6, 7]]


def rows(
    prompts: list[list[int]], ends: frozenset[int] = frozenset(), samples: int = 1, **sampling: float
) -> list[Row]:
    batch = Batch(llama(), Sampling(**sampling), ends, torch.device("cpu"), max_model_len=None)
    keys = [[random_key(1, prompt, sample) for sample in range(samples)] for prompt in prompts]
    return batch.complete(prompts, keys)


def test_a_row_does_not_depend_on_the_rest_of_its_batch() -> None:
    together = rows(PROMPTS, temperature=0, max_tokens=5)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = rows([prompt], temperature=0, max_tokens=5)
        assert row.output == alone.output
        torch.testing.assert_close(torch.tensor(row.logprobs), torch.tensor(alone.logprobs), atol=1e-5, rtol=1e-5)


def test_finished_rows_leave_the_batch_and_the_others_continue() -> None:
    free = rows(PROMPTS, samples=8, max_tokens=12)
    ends = frozenset({7, 8})
    held = rows(PROMPTS, ends, samples=8, max_tokens=12)
    assert 0 < sum(row.stopped for row in held) < len(held)
    for row, unstopped in zip(held, free, strict=True):
        last = next((index for index, token in enumerate(unstopped.output) if token in ends), len(unstopped.output) - 1)
        assert row.output == unstopped.output[: last + 1]
        assert row.stopped == (row.output[-1] in ends)
