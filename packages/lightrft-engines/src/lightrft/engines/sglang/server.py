"""The process that holds SGLang's engine. It answers calls on its connection until that is closed.

SGLang takes over the process of its engine: its environment, signal handlers and event loop. When one of its child
processes dies, SGLang kills the engine's process too. So this process belongs to SGLang alone.
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
from lightrft.engines.sglang import library, patches, scheduler
from lightrft.engines.sglang.arguments import LOADER
from lightrft.engines.sglang.requests import Answer, Request, TokenizedRequest, check_placeholders, scored_tokens
from lightrft.engines.sglang.shared_memory import Entry, to_json
from lightrft.strategy.engine import too_long_message

FLUSH_TIMEOUT = 30.0
"""Seconds within which SGLang finishes a request that it has answered."""


class Server:
    """The server's calls: each public method is one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Any = None
        self._max_model_len = 0
        self._block: torch.Tensor | None = None

    # Life

    def start(self, arguments: dict[str, Any]) -> int:
        """Start the engine. Returns the longest sequence in tokens."""
        engine_class = _engine_class(fork=arguments.get("device") == "cpu")
        patches.apply_load_file(arguments.get("dp_size", 1))
        self._engine = engine_class(**arguments)
        patches.NO_TOTAL_LIMIT.apply(self._engine.tokenizer_manager)
        self._max_model_len = self._engine._scheduler_init_result.scheduler_infos[0]["max_req_input_len"] - 1
        return self._max_model_len

    def stop(self) -> None:
        """Shut the engine down, if it was started."""
        if self._engine is not None:
            self._engine.shutdown()

    def sleep(self, tags: list[str]) -> None:
        """Free the memory of ``tags``, "weights" or "kv_cache"."""
        self._flush()
        self._engine.release_memory_occupation(tags=tags)

    def wake(self, tags: list[str]) -> None:
        """Allocate the memory of ``tags`` again."""
        self._engine.resume_memory_occupation(tags=tags)

    # Weights

    def begin(self) -> None:
        """Begin a weight update."""
        _require("begin_weight_update", self._engine.begin_weight_update())

    def lend(self, size: int) -> None:
        """Receive the descriptor of a memory block of ``size`` bytes and map it; buckets are loaded from it."""
        descriptor = recv_handle(self._connection)
        storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, size)  # type: ignore[attr-defined]
        os.close(descriptor)  # the storage has duplicated it
        self._block = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))

    def load(
        self, entries: list[Entry], size: int, handles: list[Any] | None, checksum: int | None, version: int
    ) -> None:
        """Load a bucket from the block that was lent, or from the training's memory on a device.

        Args:
            entries: The layout of the bucket in its block.
            size: The size of the block in bytes.
            handles: For each rank, what opens the block on a device; None for the lent block.
            checksum: The expected checksum, or None.
            version: The version of the weights.
        """
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        parallel = self._engine.server_args
        complete = parallel.ep_size == parallel.pp_size == 1  # then each process uses a part of every weight
        plan = to_json({"entries": entries, "size": size, "checksum": checksum, "complete": complete})
        blocks = [self._block] * parallel.tp_size if handles is None else [_DeviceBlock(handle) for handle in handles]
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
        """End the weight update, and drop what older weights computed."""
        self._block = None
        _require("end_weight_update", self._engine.end_weight_update())
        self._flush()

    def _flush(self) -> None:
        """Drop the caches. SGLang answers before its scheduler has finished a request, so this waits for it."""
        flushed = self._engine.loop.run_until_complete(
            self._engine.tokenizer_manager.flush_cache(timeout_s=FLUSH_TIMEOUT)
        )
        _require("flush_cache", (flushed.success, f"requests are still running after {FLUSH_TIMEOUT:g} s"))

    # Prompts

    def generate(
        self,
        requests: Sequence[Request],
        samples: int,
        sampling: dict[str, Any],
        seeds: Sequence[int | None],
        rescore: bool,
    ) -> list[Answer]:
        """Answer each request ``samples`` times.

        Args:
            requests: Prompts, as `lightrft.engines.sglang.requests.request` makes them.
            samples: Answers to each.
            sampling: SGLang's sampling parameters.
            seeds: A seed or None for each answer.
            rescore: Take log-probabilities from a separate forward pass.

        Returns: The answers to the first request, then those to the next.
        """
        repeated = [self._tokenized(request) for request in requests for _ in range(samples)]
        parameters = [{**sampling, "sampling_seed": seed} for seed in seeds]
        answers: dict[int, Answer] = {}
        for media in (True, False):  # one call of SGLang takes either text or token ids
            indices = [index for index, request in enumerate(repeated) if _has_media(request) == media]
            if indices:
                answered = self._answers(
                    [repeated[index] for index in indices], [parameters[index] for index in indices], rescore, media
                )
                answers.update(zip(indices, answered, strict=True))
        return [answers[index] for index in range(len(repeated))]

    def _answers(
        self, requests: Sequence[TokenizedRequest], parameters: Sequence[dict[str, Any]], rescore: bool, media: bool
    ) -> list[Answer]:
        inputs = _with_media(requests) if media else {"input_ids": [request["tokens"] for request in requests]}
        outputs = self._engine.generate(**inputs, sampling_params=list(parameters), return_logprob=True)
        answers = [_answer(request, output) for request, output in zip(requests, outputs, strict=True)]
        if rescore:
            self._rescore(requests, answers, media)
        return answers

    def _tokenized(self, request: Request) -> TokenizedRequest:
        """``request`` with token ids, after a check that SGLang can take it."""
        tokens = self._token_ids(request)
        if _has_media(request):
            request = {**request, "text": self._text_of(tokens, request["text"])}
            special = getattr(self._engine.tokenizer_manager.mm_processor, "mm_tokens", None)
            patterns = (getattr(special, "image_token_regex", None), getattr(special, "video_token_regex", None))
            check_placeholders(request, *patterns)
        if not tokens:  # SGLang would end
            raise EngineError(
                "generate: engine 'sglang' expected at least one token in each prompt, got an empty prompt. Start it with a "
                "beginning-of-sequence token, for example"
            )
        if len(tokens) >= self._max_model_len:
            raise EngineError(too_long_message("a prompt", len(tokens), self._max_model_len))
        return {**request, "tokens": tokens}

    def _token_ids(self, request: Request) -> list[int]:
        if request["tokens"] is not None:
            return list(request["tokens"])
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if tokenizer is None:
            raise EngineError(
                "generate: engine 'sglang' expected token ids, got text, and the model's directory has no tokenizer for it. "
                "Pass token ids, or a `pretrain` with a tokenizer"
            )
        return list(tokenizer(request["text"], add_special_tokens=False)["input_ids"])

    def _text_of(self, tokens: list[int], text: str | None) -> str:
        """The text of a prompt with media, which SGLang takes as text only: ``text``, or else the decoded ``tokens``."""
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if text is None:
            text = str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text, add_special_tokens=False)["input_ids"] != tokens:
            raise EngineError(
                f"generate: expected a prompt's token ids to be those of its text, got other ids for {text[:80]!r}. Engine "
                f"'sglang' takes prompts with images or videos as text: pass the text, or ids from the model's tokenizer"
            )
        return text

    def _rescore(self, requests: Sequence[TokenizedRequest], answers: Sequence[Answer], media: bool) -> None:
        """Replace log-probabilities under penalties by the model's own; with media, remove them."""
        if media:
            for answer in answers:
                answer["logprobs"] = None
            return
        scored = self._engine.generate(
            input_ids=[request["tokens"] + answer["tokens"] for request, answer in zip(requests, answers, strict=True)],
            sampling_params={"max_new_tokens": 0, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=[max(0, len(request["tokens"]) - 1) for request in requests],
        )
        for answer, output in zip(answers, scored, strict=True):
            triples = output["meta_info"]["input_token_logprobs"][-len(answer["tokens"]) :]
            last = self._engine.tokenizer_manager.model_config.vocab_size - 1
            answer["logprobs"] = scored_tokens(answer["tokens"], [triple[:2] for triple in triples], last)


class _DeviceBlock:
    """A tensor of another process on a device. Unpickling it opens the tensor."""

    def __init__(self, handle: object) -> None:
        self._handle = handle

    def __reduce__(self) -> Any:
        return torch.multiprocessing.reductions.rebuild_cuda_tensor, self._handle


def _engine_class(*, fork: bool) -> Any:
    base: Any = library.load()

    class Engine(base):  # type: ignore[misc]
        """SGLang's engine. Its scheduler processes are patched, and on a CPU they are forks that import nothing again."""

        run_scheduler_process_func = staticmethod(scheduler.run_scheduler)

        @classmethod
        def _launch_scheduler_processes(cls, *args: object, **kwargs: object) -> Any:
            if fork:
                multiprocessing.set_start_method("fork", force=True)
            return super()._launch_scheduler_processes(*args, **kwargs)

    return Engine


def _has_media(request: Request | TokenizedRequest) -> bool:
    return bool(request.get("images") or request.get("videos"))


def _with_media(requests: Sequence[TokenizedRequest]) -> dict[str, Any]:
    return {
        "prompt": [request["text"] for request in requests],
        "image_data": [list(request.get("images") or ()) or None for request in requests],
        "video_data": [list(request.get("videos") or ()) or None for request in requests],
    }


def _answer(request: TokenizedRequest, output: dict[str, Any]) -> Answer:
    facts = output["meta_info"]
    reason = facts["finish_reason"] or {"type": "nothing"}
    return {
        "prompt_tokens": request["tokens"],
        "tokens": list(output["output_ids"]),
        "logprobs": [(logprob, token) for logprob, token, _ in facts["output_token_logprobs"]],
        "finish_reason": reason["type"],
        "message": reason.get("message", ""),
        "weight_version": facts["weight_version"],
        "text": output.get("text"),
    }


def _require(call: str, result: tuple[bool, str]) -> None:
    success, message = result[:2]
    if not success:
        raise EngineError(f"SGLang's {call} failed: {message}. See the server's output for the cause")


# The process


def serve(connection: Connection) -> None:
    """Answer calls, one after the other, until the connection is closed or "stop" was answered."""
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
        if not watched:  # not earlier: SGLang has forked its processes by now
            threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
            watched = True


def _attempt(call: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", call(*arguments)
    except Exception as error:  # noqa: BLE001  the other process raises it
        return "error", (type(error).__name__, str(error), traceback.format_exc())


def _end_with(descriptor: int) -> None:
    """End this session and remove its files as soon as the other process closes the connection."""
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP | select.POLLRDHUP)
    poll.poll()
    _end_session()


def _end_session() -> NoReturn:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("this process is in the group that was killed")


def main() -> None:
    """Serve the connection whose descriptor is the first argument."""
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
