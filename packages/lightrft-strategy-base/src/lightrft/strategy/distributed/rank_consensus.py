"""How ranks agree before they do anything costly, and how they fail together.

Ranks exchange short messages over gloo. `RankConsensus.together` is the one primitive for steps that may fail on some
ranks: the rank where the step failed keeps its error, and every other rank raises an error that names that rank, the
class of the error and its message. No rank waits for one that has already failed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightrft.config import LightRFTError, StrategyError, errors
from lightrft.strategy.distributed.world import World, all_gather_rows

FRAME = 1024
"""Bytes of the first exchange; nearly every message fits in it. Longer messages take a second exchange."""
_ERRORS = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, LightRFTError)
}


class RankConsensus:
    """Agreement between the ranks of one `World`. Every rank makes the same calls in the same order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._out_of_step: str | None = None
        """Why this rank is no longer in step with the others."""

    @contextmanager
    def together(self, call: str, doing: str = "", *, report: Callable[[], Any] = lambda: None) -> Iterator[list[Any]]:
        """Run the body on every rank; if it raises on some ranks, raise on all.

        The body must not wait for another rank.

        Args:
            call: The public method, for messages.
            doing: The step of the call, if it has several.
            report: Called after the body, even if it raised; returns a JSON value to send to the other ranks.

        Yields:
            A list that is filled after the body with the values of all ranks, in rank order.

        Raises:
            Exception: On a rank where the body raised, its error; a `LightRFTError` names ``call``.
            LightRFTError: On the other ranks: the same class as that error, or `StrategyError` for errors of other
                libraries. Names the rank, the class and the message.
        """
        error: Exception | None = None
        reports: list[Any] = []
        try:
            yield reports
        except Exception as raised:  # noqa: BLE001 - sent to the other ranks, then raised again
            error = raised
        except (KeyboardInterrupt, SystemExit) as interruption:  # not exchanged: the other ranks are still busy
            self._out_of_step = f"{call} was interrupted by {type(interruption).__name__}"
            raise
        failure = None if error is None else [type(error).__name__, str(error)]
        messages = self.exchange(f"{call}: {doing}" if doing else call, [failure, report()])
        reports += [value for _, value in messages]
        if isinstance(error, LightRFTError) and not str(error).startswith(call.split()[0]):
            error.args = (f"{call}: {error}",)
        if error is not None:
            raise error
        failures = [(rank, *failure) for rank, (failure, _) in enumerate(messages) if failure is not None]
        if failures:
            reasons = "; ".join(f"rank {rank}: {name}: {text}" for rank, name, text in failures)
            raise _ERRORS.get(failures[0][1], StrategyError)(f"{call} failed on another rank; {reasons}")

    def everywhere(self, call: str, doing: str, step: Callable[[], Any]) -> list[Any]:
        """Run ``step`` on every rank, together; return its results, JSON values, in rank order."""
        results: list[Any] = []
        with self.together(call, doing, report=lambda: results[0] if results else None) as reports:
            results.append(step())
        return reports

    def on_rank_0(self, call: str, doing: str, step: Callable[[], Any]) -> Any:
        """Run ``step`` on rank 0 alone, together; return its result, a JSON value, on every rank."""
        return self.everywhere(call, doing, lambda: step() if self._world.rank == 0 else None)[0]

    def agree(self, call: str, value: object) -> None:
        """Raise `StrategyError` on every rank unless all make this ``call`` with an equal ``value``, a JSON value."""
        require_equal(call, self.exchange(call, value))

    def agree_by_digest(self, call: str, entries: Sequence[Any]) -> None:
        """Like `agree`, for a long list: the ranks compare digests, and the lists only if the digests differ."""
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        if len(set(self.exchange(call, digest))) > 1:
            self.agree(call, list(entries))

    def barrier(self) -> None:
        """Wait for every rank."""
        self.agree("barrier", None)

    def exchange(self, call: str, message: object) -> list[Any]:
        """Return every rank's ``message``, JSON values of a few hundred bytes, in rank order; equal ones may be one object.

        Raises:
            StrategyError: On every rank, if the ranks are in different calls.
        """
        if self._world.size == 1:
            return [message]
        if self._out_of_step is not None:
            raise StrategyError(
                f"{call}: expected all ranks to be at the same call, but {self._out_of_step}, and the other ranks continued. "
                f"Close the strategy"
            )
        envelopes = self._exchange_json([call, message])
        calls = [made for made, _ in envelopes]
        if len(set(calls)) > 1:
            made = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(calls))
            raise StrategyError(
                f"expected all ranks to make the same call, got {made}. Make the same calls in the same order on every rank"
            )
        return [message for _, message in envelopes]

    def _exchange_json(self, message: object) -> list[Any]:
        text = json.dumps(message).encode()
        frames = self._gather_bytes(len(text).to_bytes(8) + text[: FRAME - 8], FRAME)
        lengths = [int.from_bytes(frame[:8]) for frame in frames]
        if max(lengths) > FRAME - 8:
            frames = [b"-" * 8 + frame for frame in self._gather_bytes(text, max(lengths))]
        texts = [frame[8 : 8 + length] for frame, length in zip(frames, lengths, strict=True)]
        decoded = {text: json.loads(text) for text in set(texts)}  # ranks mostly send the same message
        return [decoded[text] for text in texts]

    def _gather_bytes(self, text: bytes, size: int) -> list[bytes]:
        """Return every rank's ``text``, padded with zeros to ``size`` bytes."""
        frames_RF = torch.empty(self._world.size, size, dtype=torch.uint8, device="cpu")  # whatever the default
        frames_RF[self._world.rank] = torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.uint8)
        all_gather_rows(frames_RF, self._world.cpu_group)
        received = frames_RF.numpy().tobytes()
        return [received[start : start + size] for start in range(0, len(received), size)]


def require_equal(call: str, values: Sequence[Any]) -> None:
    """Raise `StrategyError` if the ranks' ``values`` differ; the message has what each rank has that others lack."""
    if any(value != values[0] for value in values):
        given = "; ".join(f"rank {rank}: {_difference(value, values)}" for rank, value in enumerate(values))
        raise StrategyError(
            f"{call}: expected the same arguments on all ranks, got {given}. Pass the same on every rank"
        )


def _difference(value: object, values: Sequence[Any]) -> str:
    """Describe what one rank passed, without what all ranks passed."""
    if not isinstance(value, list):
        return repr(value)
    only_here = [_describe(entry) for entry in value if not all(entry in other for other in values)]
    more = f" and {len(only_here) - 4} more" if len(only_here) > 4 else ""
    return ", ".join(only_here[:4]) + more or "nothing else"


def _describe(entry: object) -> str:
    """Return the words for one entry: a leaf of `all_reduce`, or anything else."""
    if not (isinstance(entry, list) and len(entry) == 5):
        return repr(entry)
    name, dtype, device, ndim, shape = entry
    dims = "x".join(["n"] * (ndim - len(shape)) + [str(size) for size in shape]) or "scalar"
    return f"{name} {dtype} {dims} on {device}"
