"""Operations of the rollout engine."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lightrft.conformance.interpreter import memory
from lightrft.conformance.interpreter.session import OPERATIONS, Session, operation
from lightrft.conformance.values import Record
from lightrft.strategy import Completion
from lightrft.strategy.models.weight_stream import Bucket


@operation
def engine(session: Session, kind: str = "fake", actor: str | None = None) -> str:
    """setup_inference_engine; the engine's status."""
    model = None if actor is None else session.models[actor].model
    session.strategy.setup_inference_engine(None, kind, actor=model)
    return status(session)


@operation
def missing_engine(session: Session, actor: str) -> str | None:
    """setup_inference_engine with an engine whose library is not installed; None if all are installed."""
    name = next((name for name in ("sglang", "vllm", "transformers") if importlib.util.find_spec(name) is None), None)
    return None if name is None else engine(session, name, actor)


@operation
def status(session: Session) -> str:
    """The engine's status: absent, awake or asleep."""
    return str(session.strategy.inference_engine_status.value)


@operation
def sleep_levels(session: Session) -> list[int]:
    """The sleep levels that the engine supports."""
    current = session.strategy.inference_engine
    return [] if current is None else sorted(current.capabilities.sleep_levels)


@operation
def claims(session: Session) -> dict[str, bool]:
    """What the engine claims to support, apart from sleep levels."""
    assert session.strategy.inference_engine is not None
    supported = session.strategy.inference_engine.capabilities
    return {name: getattr(supported, name) for name in ("multimodal", "stop_strings", "seeds_by_prompt")}


@operation
def end_tokens(session: Session, model: str, ids: list[int]) -> None:
    """Set the end-of-sequence tokens of a model, as a training script would."""
    module: Any = session.models[model].module
    if getattr(module, "generation_config", None) is None:
        module.generation_config = SimpleNamespace()
    module.generation_config.eos_token_id = ids


@operation
def sync(session: Session, model: str) -> int:
    """update_engine_weights; the weight version."""
    session.strategy.update_engine_weights(session.models[model].model)
    return version(session)


@operation
def measured_sync(session: Session, model: str) -> int:
    """The bytes that update_engine_weights adds to the memory of this process at its peak."""
    device = session.strategy.device
    before = memory.begin(device)
    session.strategy.update_engine_weights(session.models[model].model)
    return memory.peak(device) - before


@operation
def version(session: Session) -> int:
    """The engine's weight_version; -1 without an engine."""
    current = session.strategy.inference_engine
    return -1 if current is None else current.weight_version


@operation
def sleep(session: Session, level: int | None = None) -> str:
    """maybe_sleep_inference_engine, or the engine's sleep with a level."""
    if level is None:
        session.strategy.maybe_sleep_inference_engine()
    else:
        assert session.strategy.inference_engine is not None
        session.strategy.inference_engine.sleep(level)
    return status(session)


@operation
def wake(session: Session) -> str:
    """wakeup_inference_engine."""
    session.strategy.wakeup_inference_engine()
    return status(session)


@operation
def generate(
    session: Session, prompts: list[list[list[int]]], sampling: Record, stay_awake: bool = False
) -> list[object]:
    """gather_and_generate with the prompts of this rank."""
    completions = session.strategy.gather_and_generate(
        sampling, all_prompt_token_ids=prompts[session.rank % len(prompts)], sleep_engine=not stay_awake
    )
    return [_record(completion) for completion in completions]


@operation
def generate_raw(
    session: Session,
    by_rank: list[Record] | None = None,
    counts: object = None,
    tokens: object = None,
    **arguments: Any,
) -> list[object]:
    """gather_and_generate with these arguments, or with different ones per rank."""
    arguments = arguments if by_rank is None else by_rank[session.rank % len(by_rank)]
    return [_record(completion) for completion in session.strategy.gather_and_generate(**arguments)]


@operation
def generate_local(session: Session, sampling: Record, token_ids: Any = None, inputs: Any = None) -> list[object]:
    """engine_generate_local."""
    return [_record(completion) for completion in session.strategy.engine_generate_local(sampling, token_ids, inputs)]


@operation
def broken_sync(session: Session, model: str, after: int) -> None:
    """Send the engine a weight stream that fails after ``after`` buckets."""
    engine = session.strategy.inference_engine
    assert engine is not None
    stream = session.strategy.full_parameters(session.models[model].model, 64)
    buckets = [[(name, tensor.clone()) for name, tensor in bucket] for bucket in stream]

    def failing() -> Iterator[Bucket]:
        yield from buckets[:after]
        raise OSError("the stream failed")

    engine.wake_up(["weights"])
    engine.update_weights(failing())


@operation
def partial_sync(session: Session, model: str, leave_out: int) -> None:
    """Send the engine a weight stream that lacks one tensor."""
    engine = session.strategy.inference_engine
    assert engine is not None
    stream = session.strategy.full_parameters(session.models[model].model, 1 << 20)
    everything = [(name, tensor.clone()) for bucket in stream for name, tensor in bucket]
    engine.wake_up(["weights"])
    engine.update_weights([everything[:leave_out] + everything[leave_out + 1 :]])


def _record(completion: Completion) -> dict[str, object]:
    return {
        "prompt": list(completion.prompt_token_ids),
        "tokens": list(completion.output_token_ids),
        "logprobs": torch.tensor(completion.logprobs, dtype=torch.float64) if completion.logprobs is not None else None,
        "reason": completion.finish_reason,
        "version": completion.weight_version,
        "text": completion.text,
        "types": sorted(
            {type(token).__name__ for token in (*completion.prompt_token_ids, *completion.output_token_ids)}
        ),
    }


@operation
def printed_by(session: Session, call: str, **arguments: object) -> str:
    """The output of another operation."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        OPERATIONS[call](session, **arguments)
    return printed.getvalue()
