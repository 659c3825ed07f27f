"""The process that holds SGLang's engine. It answers calls on its connection until that ends.

SGLang takes over the process in which its engine is: its environment, its signals, its event loop, and when one of
its children dies it kills the process. Here it may.
"""

import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NoReturn

import torch

from lightrft.config import EngineError
from lightrft.engines.sglang import library, scheduler
from lightrft.engines.sglang.arguments import LOADER
from lightrft.engines.sglang.requests import check_placeholders, scored_tokens
from lightrft.engines.sglang.shared import to_json
from lightrft.strategy.rollout.engine import too_long

PATIENCE = 30.0
"""Seconds in which a request that was answered is over."""


class Server:
    """What can be asked of the server, each method a call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Any = None
        self._longest = 0  # tokens of a sequence
        self._block: torch.Tensor | None = None

    # Life

    def start(self, arguments: dict[str, Any]) -> int:
        """Make the engine. Returns how many tokens a sequence may have."""
        scheduler.keep_load_file(arguments.get("dp_size", 1))
        self._engine = _engine_class(fork=arguments.get("device") == "cpu")(**arguments)
        # The scheduler ends a sequence that is as long as may be; this would refuse those that might become so.
        self._engine.tokenizer_manager.validate_total_tokens = False
        self._longest = self._engine._scheduler_init_result.scheduler_infos[0]["max_req_input_len"] - 1
        return self._longest

    def stop(self) -> None:
        """End what SGLang started."""
        if self._engine is not None:
            self._engine.shutdown()

    def sleep(self, tags: list[str]) -> None:
        """Give back the memory of ``tags``, "weights" or "kv_cache"."""
        self._flush()
        self._engine.release_memory_occupation(tags=tags)

    def wake(self, tags: list[str]) -> None:
        """Take the memory of ``tags`` again."""
        self._engine.resume_memory_occupation(tags=tags)

    # Weights

    def begin(self) -> None:
        """Open a session."""
        _require("begin_weight_update", self._engine.begin_weight_update())

    def lend(self, size: int) -> None:
        """Map the block of memory whose descriptor comes next, from which buckets will be loaded."""
        descriptor = recv_handle(self._connection)
        storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, size)  # type: ignore[attr-defined]
        os.close(descriptor)  # it has one of its own
        self._block = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))

    def load(
        self, entries: list[dict[str, Any]], size: int, handles: list[Any] | None, checksum: int | None, version: int
    ) -> None:
        """Load a bucket, from the lent block or from the training's memory on its device, one handle a rank."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        parallel = self._engine.server_args
        whole = parallel.ep_size == parallel.pp_size == 1  # each process of the model has a part of all weights
        plan = to_json({"entries": entries, "size": size, "checksum": checksum, "whole": whole})
        ranks = parallel.tp_size
        blocks = [_Foreign(it) for it in handles] if handles is not None else [self._block] * ranks
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize([("plan", plan), ("bucket", block)]) for block in blocks
            ],
            load_format=LOADER,
            flush_cache=False,
            weight_version=str(version),
        )
        updating = self._engine.tokenizer_manager.update_weights_from_tensor(request, None)
        _require("update_weights_from_tensor", self._engine.loop.run_until_complete(updating))

    def end(self) -> None:
        """Close the session, and forget what older weights computed."""
        self._block = None
        _require("end_weight_update", self._engine.end_weight_update())
        self._flush()

    def _flush(self) -> None:
        """Forget what was computed. Answers come before the model's process is done with them, so wait for that."""
        flushing = self._engine.tokenizer_manager.flush_cache(timeout_s=PATIENCE)
        flushed = self._engine.loop.run_until_complete(flushing)
        _require("flush_cache", (flushed.success, "requests are still running"))

    # Prompts

    def generate(
        self,
        requests: Sequence[dict[str, Any]],
        samples: int,
        sampling: dict[str, Any],
        seeds: Sequence[int | None],
        rescore: bool,
    ) -> list[dict[str, Any]]:
        """Answer each request ``samples`` times. ``rescore``: take log-probabilities from a forward of their own."""
        asked = [self._tokenized(it) for it in requests for _ in range(samples)]
        parameters = [{**sampling, "sampling_seed": seed} for seed in seeds]
        answers: dict[int, dict[str, Any]] = {}
        for media in (True, False):  # of one call SGLang takes either text or token ids
            places = [place for place, it in enumerate(asked) if _has_media(it) == media]
            if places:
                answered = self._answers(
                    [asked[it] for it in places], [parameters[it] for it in places], rescore, media
                )
                answers.update(zip(places, answered, strict=True))
        return [answers[place] for place in range(len(asked))]

    def _answers(
        self, asked: Sequence[dict[str, Any]], parameters: Sequence[dict[str, Any]], rescore: bool, media: bool
    ) -> list[dict[str, Any]]:
        inputs = _with_media(asked) if media else {"input_ids": [it["tokens"] for it in asked]}
        found = self._engine.generate(**inputs, sampling_params=list(parameters), return_logprob=True)
        answers = [_answer(it, one) for it, one in zip(asked, found, strict=True)]
        if rescore:
            self._rescore(asked, answers, media)
        return answers

    def _tokenized(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request with token ids, one that SGLang can take."""
        tokens = self._token_ids(request)
        if _has_media(request):
            request = {**request, "text": self._text_of(tokens, request["text"])}
            special = getattr(self._engine.tokenizer_manager.mm_processor, "mm_tokens", None)
            patterns = {f"{kind}s": getattr(special, f"{kind}_token_regex", None) for kind in ("image", "video")}
            check_placeholders(request, patterns)
        if not tokens:  # it would end SGLang
            raise EngineError("a prompt is empty; engine 'sglang' needs one token at least")
        if len(tokens) >= self._longest:
            raise EngineError(too_long("a prompt", len(tokens), self._longest))
        return {**request, "tokens": tokens}

    def _token_ids(self, request: dict[str, Any]) -> list[int]:
        if request["tokens"] is not None:
            return list(request["tokens"])
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if tokenizer is None:
            raise EngineError("a prompt has no token ids, and the model's directory has no tokenizer for its text")
        return list(tokenizer(request["text"], add_special_tokens=False)["input_ids"])

    def _text_of(self, tokens: list[int], text: str | None) -> str:
        """The text that these are the tokens of, which is ``text`` if any: beside media SGLang takes nothing else."""
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if text is None:
            text = str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text, add_special_tokens=False)["input_ids"] != tokens:
            raise EngineError(
                f"the token ids of a prompt with images or videos are not those of their text, {text[:80]!r}; engine "
                f"'sglang' takes such prompts as text: give it, or ids that the model's tokenizer makes"
            )
        return text

    def _rescore(self, asked: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], media: bool) -> None:
        """Replace log-probabilities of penalised logits by the model's own; with media there are none."""
        if media:
            for answer in answers:
                answer["logprobs"] = None
            return
        scored = self._engine.generate(
            input_ids=[it["tokens"] + answer["tokens"] for it, answer in zip(asked, answers, strict=True)],
            sampling_params={"max_new_tokens": 0, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=[max(0, len(it["tokens"]) - 1) for it in asked],
        )
        for answer, one in zip(answers, scored, strict=True):
            own = one["meta_info"]["input_token_logprobs"][-len(answer["tokens"]) :]
            last = self._engine.tokenizer_manager.model_config.vocab_size - 1
            answer["logprobs"] = scored_tokens(answer["tokens"], [it[:2] for it in own], last)


class _Foreign:
    """A tensor in another process's memory on a device; pickled, it is what opens it there."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __reduce__(self) -> Any:
        return torch.multiprocessing.reductions.rebuild_cuda_tensor, self._handle


def _engine_class(*, fork: bool) -> Any:
    base: Any = library.load()

    class Engine(base):  # type: ignore[misc]
        """SGLang's, whose model processes run our hooks, and on a CPU do not import everything again."""

        run_scheduler_process_func = staticmethod(scheduler.run_scheduler)

        @classmethod
        def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
            if fork:
                multiprocessing.set_start_method("fork", force=True)
            return super()._launch_scheduler_processes(*args, **kwargs)

    return Engine


def _has_media(request: dict[str, Any]) -> bool:
    return bool(request.get("images") or request.get("videos"))


def _with_media(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "prompt": [it["text"] for it in asked],
        "image_data": [list(it.get("images") or ()) or None for it in asked],
        "video_data": [list(it.get("videos") or ()) or None for it in asked],
    }


def _answer(request: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    facts = found["meta_info"]
    reason = facts["finish_reason"] or {"type": "nothing"}
    return {
        "prompt_tokens": request["tokens"],
        "tokens": list(found["output_ids"]),
        "logprobs": [(logprob, token) for logprob, token, _ in facts["output_token_logprobs"]],
        "finish_reason": reason["type"],
        "message": reason.get("message", ""),
        "weight_version": facts["weight_version"],
        "text": found.get("text"),
    }


def _require(call: str, result: tuple[bool, str]) -> None:
    success, message = result[:2]
    if not success:
        raise EngineError(f"SGLang's {call} failed: {message}")


# The process


def serve(connection: Connection) -> None:
    """Answer calls, one after the other, until the connection ends or "stop" was answered."""
    server = Server(connection)
    watched = False
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            _end_session()
        connection.send(_attempt(getattr(server, name), arguments))
        if name == "stop":
            return
        if not watched:  # not before, for SGLang has forked its processes now
            threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
            watched = True


def _attempt(call: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", call(*arguments)
    except Exception as error:  # noqa: BLE001  whatever it is, the other side hears of it
        return "error", (type(error).__name__, str(error), traceback.format_exc())


def _end_with(descriptor: int) -> None:
    """End this session, and remove its files, when the other side of the connection is gone, whatever it is at."""
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP | select.POLLRDHUP)
    poll.poll()
    _end_session()


def _end_session() -> NoReturn:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("this process is of its own group")


def main() -> None:
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
