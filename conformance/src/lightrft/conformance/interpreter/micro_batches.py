"""Operations that plan micro-batches by token budget."""

from typing import Any

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.values import Record


@operation
def plan(session: Session, lengths: list[Any], max_tokens: int | list[int], padded: bool | list[bool]) -> list[Record]:
    """plan_micro_batches of this rank's ``lengths``; the budget and ``padded`` are lists where they differ by rank."""
    made = session.strategy.plan_micro_batches(
        lengths[session.rank], max_tokens=_of_rank(max_tokens, session.rank), padded=_of_rank(padded, session.rank)
    )
    return [
        {
            "indices": list(micro_batch.indices),
            "tokens": micro_batch.tokens,
            "last": micro_batch.last,
            "weight": micro_batch.weight,
        }
        for micro_batch in made
    ]


@operation
def train_planned(session: Session, model: str, sequences: list[list[int]], max_tokens: int, padded: bool) -> Record:
    """One update over this rank's ``sequences``, in planned micro-batches; the result, and the number of fillers."""
    entry, rank_sequences = session.models[model], sequences[session.rank]
    optimizer, lengths = session.optimizer(model), [models.items_in(sequence) for sequence in rank_sequences]
    made = session.strategy.plan_micro_batches(lengths, max_tokens=max_tokens, padded=padded)
    for micro_batch in made:
        chosen = [rank_sequences[index] for index in micro_batch.indices] or [0]
        loss, items = models.loss_over(entry.model, chosen), sum(map(models.items_in, chosen))
        weight = micro_batch.weight
        session.strategy.backward(weight * loss, entry.model, optimizer, denominator=weight * items)
        result = session.strategy.optimizer_step(optimizer, entry.model, boundary=micro_batch.last)
    fillers = sum(not micro_batch.indices for micro_batch in made)
    reported = {"applied": result.applied, "grad_norm": result.grad_norm, "denominator": result.denominator}
    return {"micro_batches": len(made), "fillers": fillers, **reported}


def _of_rank(value: object, rank: int) -> Any:
    return value[rank] if isinstance(value, list) else value
