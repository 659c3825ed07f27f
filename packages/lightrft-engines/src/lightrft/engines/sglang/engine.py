"""SGLang in a server process, with tensor parallelism over further processes.

The first of the ranks that share an engine holds it. A sync is one weight update of SGLang, bucket by bucket: on a CPU
through shared memory, on a GPU from the training's memory to the model's.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import reduce_tensor
from typing_extensions import override

from lightrft.engines.model_source import ModelSource
from lightrft.engines.settings import EngineSettings
from lightrft.engines.sglang import requests
from lightrft.engines.sglang.arguments import server_arguments
from lightrft.engines.sglang.library import SGLANG
from lightrft.engines.sglang.server_process import ServerDied, ServerProcess
from lightrft.engines.sglang.shared_memory import PIECE, SharedBlock, checksum, fill, layout, pieces
from lightrft.strategy.engine import (
    PARTS,
    Bucket,
    Completion,
    EngineBase,
    EngineCapabilities,
    EngineRequest,
    Part,
    Prompt,
    Sampling,
)

TIMEOUT_FRACTION = 0.8
"""Fraction of ``timeout`` after which a call fails: before the ranks that wait for it reach their own timeout."""


class SGLangEngine(EngineBase):
    """Generates with SGLang, in a server process of this rank."""

    supported_settings = frozenset({"engine_mem_util"})
    leader_only = True

    def __init__(self, request: EngineRequest, source: ModelSource) -> None:
        super().__init__(has_weights=source.loads_weights)
        self._source, self._device = source, request.device
        self.vocab_size, self.eos_token_ids = source.vocab_size, source.eos_token_ids
        self._arguments = server_arguments(
            request.config, source, device=request.device.type, index=request.device.index or 0,
            seed=request.config.seed + request.rank,
        )  # fmt: skip
        self._timeout, self._ranks = TIMEOUT_FRACTION * request.config.timeout, request.config.engine_tp_size
        self._verify = EngineSettings.of(request.config).verifies
        sleeps = request.config.enable_engine_sleep or request.device.type == "cpu"
        self.capabilities = EngineCapabilities(
            multimodal=source.has_tokenizer,
            stop_strings=source.has_tokenizer,
            seeds_by_prompt=True,
            sleep_levels=frozenset({1, 2}) if sleeps else frozenset(),
        )
        self._released: frozenset[Part]
        self._start()

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        SGLANG.require()
        source = ModelSource.of(request, "sglang")
        try:
            return cls(request, source)
        except BaseException:
            source.close()
            raise

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        return self._source.expected

    @property
    @override
    def awake(self) -> frozenset[Part]:
        return super().awake if self._server.alive else frozenset()

    # Prompts

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        arguments = requests.sampling_arguments(
            sampling, self.eos_token_ids | self._source.tokenizer_eos_token_ids, tokenizer=self._source.has_tokenizer
        )
        answers = self._call(
            "generate", [requests.request(prompt) for prompt in prompts], sampling.n, arguments,
            requests.seeds(prompts, sampling), requests.alters_logits(sampling),
        )  # fmt: skip
        return requests.completions(prompts, answers, sampling, version=self.weight_version)

    def _call(self, name: str, *arguments: object, descriptor: int | None = None) -> Any:
        """Call the server. If it died, the weights are lost and the engine is stale."""
        try:
            return self._server.call(name, *arguments, descriptor=descriptor)
        finally:
            if not self._server.alive:
                self._stale = "its server process died and its weights are lost"

    # Weights

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if not self._server.alive:
            self._start()
            self._release(PARTS - self.awake)
        self._call("begin")
        try:
            with contextlib.closing(_Blocks(self)) as blocks:
                for bucket in buckets:
                    blocks.send(bucket, self.weight_version + 1)
        except ServerDied:
            raise
        except BaseException:
            self._end_update()
            raise
        self._call("end")

    def _end_update(self) -> None:
        """End a weight update that failed, so that another can begin. If that fails too, end the server."""
        try:
            self._server.call("end")
        except Exception:  # noqa: BLE001  the caller raises the first failure
            self._server.end()

    def _start(self) -> None:
        self._server = ServerProcess(self._arguments, self._timeout)
        self.max_model_len = self._server.max_model_len
        self._released = frozenset()

    # Memory

    @override
    def _sleep(self, level: int) -> None:
        # Level 1 keeps the weights in host memory; on a CPU they are there already.
        keeps_weights = level == 1 and self._device.type == "cpu"
        self._release(frozenset({"kv_cache"}) if keeps_weights else PARTS)

    def _release(self, parts: frozenset[Part]) -> None:
        present = parts - self._released
        if present and self._server.alive:
            self._call("sleep", sorted(present))
            self._released |= present

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        released = parts & self._released
        if released and self._server.alive:
            self._call("wake", sorted(released))
            self._released -= released

    @override
    def _shutdown(self) -> None:
        self._server.stop()
        self._source.close()


class _Blocks:
    """Sends buckets to the server. In host memory, all use one block, as large as the largest bucket so far."""

    def __init__(self, engine: SGLangEngine) -> None:
        self._engine = engine
        self._shared: SharedBlock | None = None

    def send(self, bucket: Bucket, version: int) -> None:
        """Have the server load a bucket as part of weight ``version``. Returns when nothing reads the bucket any more."""
        on_device = bool(bucket) and bucket[0][1].is_cuda
        for piece in [bucket] if on_device else pieces(bucket, PIECE):
            self._send(piece, version, on_device=on_device)

    def _send(self, bucket: Sequence[tuple[str, torch.Tensor]], version: int, *, on_device: bool) -> None:
        entries, size = layout(bucket)
        block = torch.empty(size, dtype=torch.uint8, device=bucket[0][1].device) if on_device else self._host(size)
        fill(block, entries, bucket)
        total = checksum(block) if self._engine._verify else None
        handles = [_handle(block) for _ in range(self._engine._ranks)] if on_device else None
        self._engine._call("load", entries, size, handles, total, version)

    def _host(self, size: int) -> torch.Tensor:
        if self._shared is None or self._shared.size < size:
            self.close()
            self._shared = SharedBlock(size)
            self._engine._call("lend", size, descriptor=self._shared.descriptor)
        return self._shared.bytes[:size]

    def close(self) -> None:
        """Free the memory."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _handle(block: torch.Tensor) -> tuple[Any, ...]:
    """The data by which another process opens ``block``. It names the device by its UUID: numbers differ by process."""
    torch.cuda.current_stream(block.device).synchronize()
    _, arguments = reduce_tensor(block)
    device = str(torch.cuda.get_device_properties(block.device).uuid)
    return (*arguments[:6], device, *arguments[7:])
