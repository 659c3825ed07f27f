"""vLLM in this process: an engine a rank, or one engine over the ranks that share it (tensor parallelism).

Weights go from the training's memory into the model's on the same device, through one reload session a sync.
"""

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.engines.seeds import seed_of
from lightrft.engines.settings import EngineSettings
from lightrft.engines.source import ModelSource
from lightrft.engines.vllm import library, verify
from lightrft.engines.vllm.arguments import llm_arguments, variables
from lightrft.engines.vllm.interrupts import put_off
from lightrft.engines.vllm.prompts import completions, request, sampling_arguments
from lightrft.engines.vllm.reload import forget, reload
from lightrft.engines.vllm.territory import Territory
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, EngineRequest, Prompt, Sampling
from lightrft.strategy.rollout.engine import Part
from lightrft.strategy.rollout.weights import Bucket


class VLLMEngine(EngineBase):
    """Generates with vLLM. All ranks that share an engine call it alike."""

    honours = frozenset({"engine_mem_util"})
    _alive: "VLLMEngine | None" = None  # vLLM keeps its groups in globals: one engine a process

    def __init__(self, request: EngineRequest, source: ModelSource) -> None:
        super().__init__(has_weights=source.loads_weights)
        self._source, self._group, self._device = source, request.group, request.device
        place = 0 if request.group is None else dist.get_rank(request.group)
        self._arguments = llm_arguments(
            request.config, source, on_cpu=request.device.type == "cpu", seed=request.config.seed + request.rank - place
        )
        self._timeout = timedelta(seconds=request.config.timeout)
        self._verify = EngineSettings.of(request.config).verifies
        self._broken = self._half_done = self._in_step = False
        self._deliver_interrupt: Callable[[], None] = lambda: None
        self.vocabulary = source.vocabulary
        self.capabilities = EngineCapabilities(
            multimodal=True,
            stop_strings=source.has_tokenizer,
            seeds_by_prompt=True,
            sleep_levels=frozenset({1, 2}) if request.config.enable_engine_sleep else frozenset(),
        )
        self._open()

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        library.VLLM.require(())
        if VLLMEngine._alive is not None:
            raise EngineError(
                "engine 'vllm': there is one in this process already, and vLLM has room for one; shutdown() that first"
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
        self._territory = Territory(self._group, self._device, self._timeout)
        self._territory.set_variables(variables(self._territory.rank, self._territory.size, self._device.index or 0))
        try:
            self._territory.found()
            self._half_done = False
            with self._inside():
                self._vllm = library.load()
                library.number_groups(self._territory.number)
                with _translated("start"):
                    self._llm = self._vllm.LLM(**self._arguments)
                self._watch_steps()
                self.longest = int(self._llm.llm_engine.model_config.max_model_len)
        except BaseException:
            self._close()
            raise
        finally:
            library.forget_names(self._territory.number)

    def _watch_steps(self) -> None:
        """Know whether a step came to its end; after each one, Ctrl-C may come."""
        engine = self._llm.llm_engine
        original = engine.step

        def step() -> Any:
            self._in_step = True
            outputs = original()
            self._in_step = False
            self._deliver_interrupt()
            return outputs

        engine.step = step
        self._in_step = False

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """vLLM's own ground, with Ctrl-C put off to where the body lets it come."""
        with put_off() as self._deliver_interrupt, self._inside():
            yield

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """vLLM's own ground. Where it is to be eager, its samplers compile nothing either."""
        stance = (
            torch.compiler.set_stance("force_eager") if self._arguments["enforce_eager"] else contextlib.nullcontext()
        )
        with self._territory.inside(), stance:
            yield

    def _close(self) -> None:
        """End vLLM, as far as there is one."""
        llm = self.__dict__.pop("_llm", None)
        with self._territory.inside(), contextlib.ExitStack() as ending:
            ending.callback(gc.collect)
            ending.callback(_forget_groups)
            if llm is not None:
                ending.callback(llm.llm_engine.engine_core.shutdown)
        self._territory.abandon()

    # What it promises

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        return self._source.expected

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        tokenizer = self._llm.get_tokenizer() if self._source.has_tokenizer else None
        arguments = sampling_arguments(sampling, self._source.end_ids, tokenizer=tokenizer is not None)
        requests = [request(prompt) for prompt in prompts]
        with self._undisturbed(), self._giving_up_on_half_a_step():
            self._forget_half_done()
            self._half_done = True
            with _translated("generate"):
                # vLLM adds a sample's number to the seed of its prompt
                parameters = [
                    self._vllm.SamplingParams(**arguments, seed=seed_of(prompt, sampling)) for prompt in prompts
                ]
                answers = self._llm.generate(
                    requests, parameters, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False}
                )
            self._half_done = False
        return completions(prompts, answers, sampling, version=self.weight_version, tokenizer=tokenizer)

    @contextlib.contextmanager
    def _giving_up_on_half_a_step(self) -> Iterator[None]:
        """An engine that failed in the midst of a step generates no more, until the next sync builds it anew."""
        try:
            yield
        except BaseException:
            if self._in_step:
                self._broken, self._stale = True, "vLLM failed in the midst of a step"
            raise

    def _forget_half_done(self) -> None:
        """What a call left that failed or was interrupted: requests that would be answered among those of the next, and
        caches that count as filled with what was never computed.
        """
        if self._half_done:
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            forget(self._llm)
            self._half_done = False

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if self._is_broken_anywhere():
            self._close()
            self._open()
        self._broken = True  # until it ends well: vLLM cannot take up a reload that was left
        with self._undisturbed(), _translated("take the weights"):
            self._forget_half_done()
            sums: Counter[str] = Counter()
            tensors = self._tensors(buckets)
            reload(self._llm, verify.sent_sums(tensors, sums) if self._verify else tensors)
            if self._verify:
                (held,) = self._llm.apply_model(verify.held_sums)
                verify.require_equal(sums, held)
        self._broken = False

    def _is_broken_anywhere(self) -> bool:
        """Whether a reload died on any rank that shares this engine: they must be built anew together."""
        if self._group is None:
            return self._broken
        flag = torch.tensor([int(self._broken)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _tensors(self, buckets: Iterator[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of their own: vLLM keeps those of a layer until the layer is complete, a bucket lives less long."""
        for bucket in self._outside(buckets):
            for name, tensor in bucket:
                yield name, tensor.clone()

    def _outside(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """``buckets``, whose making gathers over the training's process groups."""
        while True:
            with self._territory.outside(), _not_vllms():
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket
            with _not_vllms():
                self._deliver_interrupt()

    @override
    def _sleep(self, level: int) -> None:
        with self._undisturbed():
            if self._llm.llm_engine.is_sleeping():
                self._llm.wake_up()  # vLLM goes from awake to asleep only
            weights = sum(self._llm.apply_model(_device_bytes))
            before = torch.cuda.mem_get_info(self._device)[0]
            self._llm.sleep(level=level)
            freed = torch.cuda.mem_get_info(self._device)[0] - before
        if freed < weights:
            raise EngineError(f"vLLM's sleep(level={level}) gave {freed} bytes back, less than its weights, {weights}")

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        with self._undisturbed():
            self._llm.wake_up(tags=sorted(parts))

    @override
    def _shutdown(self) -> None:
        VLLMEngine._alive = None
        self._close()
        self._source.close()


class _OfTheStream(BaseException):
    """Carries an exception of the weight stream through vLLM."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


@contextlib.contextmanager
def _not_vllms() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise _OfTheStream(error) from error


@contextlib.contextmanager
def _translated(call: str) -> Iterator[None]:
    """vLLM's exceptions as `EngineError`; what came through vLLM, or is one already, as it was."""
    try:
        yield
    except EngineError:
        raise
    except _OfTheStream as carrier:
        raise carrier.error from None
    except Exception as error:
        raise EngineError(f"vLLM could not {call}: {type(error).__name__}: {error}") from error


def _device_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.parameters() if tensor.is_cuda)


def _forget_groups() -> None:
    """What vLLM keeps in globals, also of an engine whose building failed; nothing where it was not imported."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    if state is not None:
        state.cleanup_dist_env_and_memory()
