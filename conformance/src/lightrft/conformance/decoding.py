"""The completions and log-probabilities that an engine must return, computed without one."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lightrft.conformance import models


def greedy(module: nn.Module, prompt: Sequence[int], tokens: int) -> tuple[list[int], list[float]]:
    """The greedy completion of ``tokens`` tokens, and their log-probabilities."""
    output: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        for _ in range(tokens):
            logits = models.logits_of(module, torch.tensor([[*prompt, *output]]))[0, -1].float()
            output.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(dim=-1)[output[-1]]))
    return output, logprobs


def penalised(
    module: nn.Module, prompt: Sequence[int], tokens: int, penalties: Sequence[float], *, forgets_prompt: bool = False
) -> tuple[list[int], float]:
    """The greedy completion with penalties (repetition, presence, frequency).

    Returns:
        The tokens, and the smallest difference in logits between a token and the next likely one.

    ``forgets_prompt``: apply the repetition penalty to tokens of the completion only.
    """
    repetition, presence, frequency = penalties
    output: list[int] = []
    lead = math.inf
    with torch.no_grad():
        for _ in range(tokens):
            row = models.logits_of(module, torch.tensor([[*prompt, *output]]))[0, -1].float().tolist()
            for token in {*output, *(() if forgets_prompt else prompt)}:
                row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
            for token, times in Counter(output).items():
                row[token] -= presence + frequency * times
            first, second = sorted(row, reverse=True)[:2]
            lead = min(lead, first - second)
            output.append(row.index(first))
    return output, lead


def score(module: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> list[float]:
    """The log-probability of each token of ``output`` after ``prompt``."""
    with torch.no_grad():
        logits = models.logits_of(module, torch.tensor([[*prompt, *output]]))[0].float().log_softmax(dim=-1)
    return [float(logits[len(prompt) - 1 + index, token]) for index, token in enumerate(output)]
