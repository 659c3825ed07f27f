"""The questions, and what counts as an answer.

"Compute 7 * 8. Write the equation only." is answered by exactly ``7 * 8 = 56`` and the end of the turn:
nothing before, nothing after. Unordered pairs of operands are split in halves, so that no held-out question
is a training question turned round.
"""

import random
from dataclasses import dataclass

PROMPT = "<|im_start|>user\nCompute {question}. Write the equation only.<|im_end|>\n<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
LARGEST = 12


@dataclass(frozen=True)
class Question:
    """Two operands, and "+" or "*" between them."""

    left: int
    sign: str
    right: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self)

    @property
    def answer(self) -> str:
        """The one text that counts."""
        result = self.left + self.right if self.sign == "+" else self.left * self.right
        return f"{self} = {result}"


def reward(question: Question, text: str) -> float:
    """1 where ``text``, end of turn included, is the equation and nothing else; else 0."""
    return float(text == question.answer + END_OF_TURN)


def questions() -> tuple[list[Question], list[Question]]:
    """The training questions and the held-out ones; the same in every run."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    half = len(pairs) // 2
    return _both_ways(pairs[half:]), _both_ways(pairs[:half])


def _both_ways(pairs: list[tuple[int, int]]) -> list[Question]:
    return [Question(x, sign, y) for sign in "+*" for a, b in pairs for x, y in sorted({(a, b), (b, a)})]
