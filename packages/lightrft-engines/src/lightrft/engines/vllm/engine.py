"""vLLM in this process: one engine for each rank, or one over several ranks (tensor parallelism).

A sync copies weights from the training's memory to the model's on the same device, in one reload session.
"""

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.engines.model_source import ModelSource
from lightrft.engines.seeds import completion_seed
from lightrft.engines.settings import EngineSettings
from lightrft.engines.vllm import library, patches, weight_checksums
from lightrft.engines.vllm.arguments import llm_arguments, variables
from lightrft.engines.vllm.defer_sigint import defer_sigint
from lightrft.engines.vllm.process_state import ProcessState
from lightrft.engines.vllm.prompts import completions, request, sampling_arguments
from lightrft.engines.vllm.reload import reload, reset_caches
from lightrft.strategy.engine import (
    Bucket,
    Completion,
    EngineBase,
    EngineCapabilities,
    EngineRequest,
    Part,
    Prompt,
    Sampling,
)


class VLLMEngine(EngineBase):
    """Generates with vLLM. All ranks that share an engine must make the same calls."""

    supported_settings = frozenset({"engine_mem_util"})
    _alive: "VLLMEngine | None" = None  # vLLM keeps its process groups in globals: one engine in a process

    def __init__(self, request: EngineRequest, source: ModelSource) -> None:
        super().__init__(has_weights=source.loads_weights)
        self._source, self._group, self._device = source, request.group, request.device
        group_rank = 0 if request.group is None else dist.get_rank(request.group)
        self._arguments = llm_arguments(
            request.config, source, on_cpu=request.device.type == "cpu",
            seed=request.config.seed + request.rank - group_rank,
        )  # fmt: skip
        self._timeout = timedelta(seconds=request.config.timeout)
        self._verify = EngineSettings.of(request.config).verifies
        self._broken = self._in_flight = self._in_step = False
        self._deliver_interrupt: Callable[[], None] = lambda: None
        self._undo: Callable[[], None] = lambda: None
        self.vocab_size, self.eos_token_ids = source.vocab_size, source.eos_token_ids
        self.capabilities = EngineCapabilities(
            multimodal=True,
            audio=True,
            stop_strings=source.has_tokenizer,
            seeds_by_prompt=True,
            sleep_levels=frozenset({1, 2}) if request.config.enable_engine_sleep else frozenset(),
        )
        self._open()

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        library.VLLM.require()
        if VLLMEngine._alive is not None:
            raise EngineError(
                "setup_inference_engine: expected no other vLLM engine in this process, got one. vLLM supports one engine in a "
                "process: call shutdown() on the other one first"
            )
        source = ModelSource.of(request, "vllm")
        try:
            engine = cls(request, source)
        except BaseException:
            source.close()
            raise
        VLLMEngine._alive = engine
        return engine

    # Building

    def _open(self) -> None:
        self._state = ProcessState(self._group, self._device, self._timeout)
        self._state.set_variables(variables(self._state.rank, self._state.size, self._device.index or 0))
        try:
            self._state.initialize()
            self._in_flight = False
            with self._inside():
                self._vllm = library.load()
                self._undo = patches.group_numbers(self._state.number).apply()
                with _translated("start"):
                    self._llm = self._vllm.LLM(**self._arguments)
                self._in_step = False
                patches.step_callbacks(self._step_begins, self._step_ended).apply(self._llm.llm_engine)
                self.max_model_len = int(self._llm.llm_engine.model_config.max_model_len)
        except BaseException:
            self._close()
            raise
        finally:
            patches.remove_shared_memory_names(self._state.number)

    def _step_begins(self) -> None:
        self._in_step = True

    def _step_ended(self) -> None:
        self._in_step = False
        self._deliver_interrupt()

    @contextlib.contextmanager
    def _with_deferred_sigint(self) -> Iterator[None]:
        """Run the body in vLLM's process state. Ctrl-C is deferred until the body delivers it."""
        with defer_sigint() as self._deliver_interrupt, self._inside():
            yield

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Run the body in vLLM's process state. In eager mode, vLLM's samplers compile nothing either."""
        stance = (
            torch.compiler.set_stance("force_eager") if self._arguments["enforce_eager"] else contextlib.nullcontext()
        )
        with self._state.inside(), stance:
            yield

    def _close(self) -> None:
        """End vLLM, if it was started."""
        llm = self.__dict__.pop("_llm", None)
        with self._state.inside(), contextlib.ExitStack() as closing:
            closing.callback(gc.collect)
            closing.callback(self._undo)
            closing.callback(_destroy_groups)
            if llm is not None:
                closing.callback(llm.llm_engine.engine_core.shutdown)
        self._state.destroy()

    # Hooks

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        return self._source.expected

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        tokenizer = self._llm.get_tokenizer() if self._source.has_tokenizer else None
        arguments = sampling_arguments(
            sampling, self.eos_token_ids | self._source.tokenizer_eos_token_ids, tokenizer=tokenizer is not None
        )
        requests = [request(prompt) for prompt in prompts]
        with self._with_deferred_sigint(), self._broken_by_failed_step():
            self._abort_in_flight()
            self._in_flight = True
            with _translated("generate"):
                # vLLM adds the sample number to the seed of the prompt.
                parameters = [
                    self._vllm.SamplingParams(**arguments, seed=completion_seed(prompt, sampling)) for prompt in prompts
                ]
                answers = self._llm.generate(
                    requests, parameters, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False}
                )
            self._in_flight = False
        return completions(prompts, answers, sampling, version=self.weight_version, tokenizer=tokenizer)

    @contextlib.contextmanager
    def _broken_by_failed_step(self) -> Iterator[None]:
        """If the body fails in the middle of a step, refuse to generate until the next sync makes a new engine."""
        try:
            yield
        except BaseException:
            if self._in_step:
                self._broken, self._stale = True, "vLLM failed in the middle of a step"
            raise

    def _abort_in_flight(self) -> None:
        """Remove what a failed or interrupted call left: its requests, which vLLM would answer with those of the next call,
        and cache entries that were never computed.
        """
        if self._in_flight:
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            reset_caches(self._llm, "generate")
            self._in_flight = False

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if self._is_broken_anywhere():
            self._close()
            self._open()
        self._broken = True  # until it succeeds: vLLM cannot resume an interrupted reload
        with self._with_deferred_sigint(), _translated("load the weights"):
            self._abort_in_flight()
            sums: Counter[str] = Counter()
            tensors = self._tensors(buckets)
            reload(self._llm, weight_checksums.count_sent(tensors, sums) if self._verify else tensors)
            if self._verify:
                (held,) = self._llm.apply_model(weight_checksums.held_sums)
                weight_checksums.require_equal(sums, held)
        self._broken = False

    def _is_broken_anywhere(self) -> bool:
        """Whether a reload failed on any rank that shares this engine: all of them must make a new one together."""
        if self._group is None:
            return self._broken
        flag = torch.tensor([int(self._broken)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _tensors(self, buckets: Iterator[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of the tensors: vLLM keeps them until their layer is complete, longer than their bucket exists."""
        for bucket in self._outside(buckets):
            for name, tensor in bucket:
                yield name, tensor.clone()

    def _outside(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """``buckets``, made in the training's process state, whose process groups gather them."""
        while True:
            with self._state.outside(), _carried():
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket
            with _carried():
                self._deliver_interrupt()

    @override
    def _sleep(self, level: int) -> None:
        with self._with_deferred_sigint():
            if self._llm.llm_engine.is_sleeping():
                self._llm.wake_up()  # vLLM changes the sleep level only from awake
            weights = sum(self._llm.apply_model(_device_bytes))
            before = torch.cuda.mem_get_info(self._device)[0]
            self._llm.sleep(level=level)
            freed = torch.cuda.mem_get_info(self._device)[0] - before
        if freed < weights:
            raise EngineError(
                f"sleep(level={level}): expected vLLM to free at least the {weights} bytes of its weights, got {freed}. "
                f"Use enable_engine_sleep=False"
            )

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        with self._with_deferred_sigint():
            self._llm.wake_up(tags=sorted(parts))

    @override
    def _shutdown(self) -> None:
        VLLMEngine._alive = None
        self._close()
        self._source.close()


class _CarriedError(BaseException):
    """Carries an exception of the weight stream through vLLM, which does not catch a BaseException."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


@contextlib.contextmanager
def _carried() -> Iterator[None]:
    """Carry exceptions of the body through vLLM unchanged; `_translated` unpacks them."""
    try:
        yield
    except BaseException as error:
        raise _CarriedError(error) from error


@contextlib.contextmanager
def _translated(call: str) -> Iterator[None]:
    """Raise vLLM's exceptions as `EngineError`; carried exceptions and `EngineError` stay as they are."""
    try:
        yield
    except EngineError:
        raise
    except _CarriedError as carrier:
        raise carrier.error from None
    except Exception as error:
        raise EngineError(
            f"vLLM could not {call}: {type(error).__name__}: {error}. Fix the cause; if vLLM has ended, call "
            f"setup_inference_engine again"
        ) from error


def _device_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.parameters() if tensor.is_cuda)


def _destroy_groups() -> None:
    """Destroy the process groups in vLLM's globals, also after a failed start. Does nothing before its import."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    if state is not None:
        state.cleanup_dist_env_and_memory()
