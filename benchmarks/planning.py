"""Plans of micro-batches by token budget: the time they take, and the padding that they leave.

``python planning.py``. Padding is compared with micro-batches of a fixed size: sequences in order, each time as many as fit
into the budget at any length. "Reasoning" has long-tailed lengths; "uniform" makes about as many micro-batches as sequences;
"arithmetic" has the lengths and the budget of examples/rlvr_arithmetic.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from measure import Goal, Report, parser

from lightrft.strategy import FakeStrategy

LONGEST = 16_384
PROMPTS = {21: 80, 22: 68, 23: 4}
"""Tokens of the demo's prompts, and how many prompts have that many."""
ANSWERS = {8: 23, 9: 57, 10: 66, 11: 4, 12: 2, 14: 152}
"""Tokens of its responses: right ones, and as many that were cut off."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences to plan, and a budget."""

    name: str
    lengths_of: Callable[[random.Random, int], list[int]]
    at_a_time: int
    """Sequences of one rank in an update."""
    max_tokens: int


def main() -> int:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--sequences", type=int, default=100_000)
    args = arguments.parse_args()
    report = Report(args.output)
    with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
        for case in CASES:
            lengths = case.lengths_of(random.Random(0), args.sequences)
            for padded in (True, False):
                report_time(report, strategy, case, lengths, args.rounds, padded=padded)
            if 2 * max(lengths) <= case.max_tokens:  # otherwise, micro-batches of a fixed size have one sequence
                report_padding(report, strategy, case, lengths)
    return 0


def report_time(
    report: Report, strategy: FakeStrategy, case: Case, lengths: list[int], rounds: int, *, padded: bool
) -> None:
    """Report the processor time of plans."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        plan = strategy.plan_micro_batches(lengths, max_tokens=case.max_tokens, padded=padded)
        seconds.append(time.process_time() - start)
    name = f"plan, {case.name}, {'padded' if padded else 'packed'}, {len(lengths):,} sequences"
    report.add(name, "micro-batches", [len(plan)])
    report.add(name, "processor time", seconds, unit="s", goal=Goal(0.3))


def report_padding(report: Report, strategy: FakeStrategy, case: Case, lengths: list[int]) -> None:
    """Compare the padding of plans of some sequences at a time, which are those of one rank in an update."""
    updates = [lengths[start : start + case.at_a_time] for start in range(0, len(lengths), case.at_a_time)][:100]
    plans = [strategy.plan_micro_batches(update, max_tokens=case.max_tokens, padded=True) for update in updates]
    tokens = sum(map(sum, updates))
    planned = sum(micro_batch.tokens for plan in plans for micro_batch in plan) - tokens
    fixed = sum(tokens_of_fixed(update, case.max_tokens) for update in updates) - tokens
    name = f"padding, {case.name}, {case.at_a_time} sequences at a time"
    report.add(name, "planned, share of tokens", [planned / tokens])
    report.add(name, "fixed, share of tokens", [fixed / tokens])
    report.add(name, "planned / fixed", [planned / fixed], goal=Goal(0.5))


def tokens_of_fixed(lengths: Sequence[int], max_tokens: int) -> int:
    """Tokens, padding included, of micro-batches of a fixed number of sequences."""
    size = max_tokens // max(lengths)
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def reasoning(stream: random.Random, count: int) -> list[int]:
    return [min(LONGEST, 64 + int(stream.lognormvariate(6.5, 1.0))) for _ in range(count)]


def uniform(stream: random.Random, count: int) -> list[int]:
    return [stream.randint(1, LONGEST) for _ in range(count)]


def arithmetic(stream: random.Random, count: int) -> list[int]:
    prompts = stream.choices(list(PROMPTS), PROMPTS.values(), k=count)
    answers = stream.choices(list(ANSWERS), ANSWERS.values(), k=count)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


CASES = (
    Case(name="reasoning", lengths_of=reasoning, at_a_time=256, max_tokens=32_768),
    Case(name="uniform", lengths_of=uniform, at_a_time=256, max_tokens=LONGEST),
    Case(name="arithmetic", lengths_of=arithmetic, at_a_time=16, max_tokens=256),
)

if __name__ == "__main__":
    sys.exit(main())
