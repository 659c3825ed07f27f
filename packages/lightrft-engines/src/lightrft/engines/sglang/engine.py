"""SGLang beside this process: a server process an engine, with tensor parallelism over processes of its own.

Of the ranks that share an engine the first holds it. Weights go through one session of SGLang's a sync, a bucket at a
time: on a CPU through shared memory, on a GPU out of the training's memory into the model's.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import reduce_tensor
from typing_extensions import override

from lightrft.engines.settings import EngineSettings
from lightrft.engines.sglang import requests
from lightrft.engines.sglang.arguments import server_arguments
from lightrft.engines.sglang.library import SGLANG
from lightrft.engines.sglang.process import ServerDied, ServerProcess
from lightrft.engines.sglang.shared import PIECE, SharedBlock, checksum, fill, layout, pieces
from lightrft.engines.source import ModelSource
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, EngineRequest, Prompt, Sampling
from lightrft.strategy.rollout.engine import PARTS, Part
from lightrft.strategy.rollout.weights import Bucket

PATIENCE = 0.8
"""Part of ``timeout`` after which a call is given up, so that ranks which wait for its end are still waiting."""


class SGLangEngine(EngineBase):
    """Generates with SGLang, in a server process that this rank holds."""

    honours = frozenset({"engine_mem_util"})
    leader_only = True

    def __init__(self, request: EngineRequest, source: ModelSource) -> None:
        super().__init__(has_weights=source.loads_weights)
        self._source, self._device = source, request.device
        self.vocabulary = source.vocabulary
        self._arguments = server_arguments(
            request.config, source, device=request.device.type, index=request.device.index or 0,
            seed=request.config.seed + request.rank,
        )  # fmt: skip
        self._timeout, self._ranks = PATIENCE * request.config.timeout, request.config.engine_tp_size
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
        SGLANG.require(())
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
        arguments = requests.sampling_arguments(sampling, self._source.end_ids, tokenizer=self._source.has_tokenizer)
        answers = self._call(
            "generate", [requests.request(prompt) for prompt in prompts], sampling.n, arguments,
            requests.seeds(prompts, sampling), requests.alters_logits(sampling),
        )  # fmt: skip
        return requests.completions(prompts, answers, sampling, version=self.weight_version)

    def _call(self, name: str, *arguments: Any, descriptor: int | None = None) -> Any:
        """Call the server; where it dies, the weights have died with it."""
        try:
            return self._server.call(name, *arguments, descriptor=descriptor)
        finally:
            if not self._server.alive:
                self._stale = "its server process died, and the weights with it"

    # Weights

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if not self._server.alive:
            self._rebuild()
        self._call("begin")
        try:
            with contextlib.closing(_Blocks(self)) as blocks:
                for bucket in buckets:
                    blocks.send(bucket, self.weight_version + 1)
        except ServerDied:
            raise
        except BaseException:
            self._close_session()
            raise
        self._call("end")

    def _close_session(self) -> None:
        """Close a session that failed, so that another can be opened, or end the server where it cannot be closed."""
        try:
            self._server.call("end")
        except Exception:  # noqa: BLE001  the failure that led here is the one to be told of
            self._server.end()

    def _start(self) -> None:
        self._server = ServerProcess(self._arguments, self._timeout)
        self.longest = self._server.longest
        self._released = frozenset()

    def _rebuild(self) -> None:
        self._start()
        self._give_back(PARTS - self.awake)

    # Memory

    @override
    def _sleep(self, level: int) -> None:
        # On a CPU the weights that level 1 keeps in host memory are there already.
        keeps_weights = level == 1 and self._device.type == "cpu"
        self._give_back(frozenset({"kv_cache"}) if keeps_weights else PARTS)

    def _give_back(self, parts: frozenset[Part]) -> None:
        going = parts - self._released
        if going and self._server.alive:
            self._call("sleep", sorted(going))
            self._released |= going

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        coming = parts & self._released
        if coming and self._server.alive:
            self._call("wake", sorted(coming))
            self._released -= coming

    @override
    def _shutdown(self) -> None:
        self._server.stop()
        self._source.close()


class _Blocks:
    """The way of buckets to the server: in host memory one block for all of them, as large as the largest so far."""

    def __init__(self, engine: SGLangEngine) -> None:
        self._engine = engine
        self._shared: SharedBlock | None = None

    def send(self, bucket: Bucket, version: int) -> None:
        """Have a bucket loaded. Returns when nothing reads it any more."""
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
        """Let go of the memory."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None


def _handle(block: torch.Tensor) -> tuple[Any, ...]:
    """What another process opens ``block`` by. The device goes by its own name: its number may differ there."""
    torch.cuda.current_stream(block.device).synchronize()
    _, arguments = reduce_tensor(block)
    device = str(torch.cuda.get_device_properties(block.device).uuid)
    return (*arguments[:6], device, *arguments[7:])
