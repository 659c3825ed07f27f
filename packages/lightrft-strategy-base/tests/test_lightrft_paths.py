"""The module paths that LightRFT's trainers, models and examples import."""

import subprocess
import sys

import exchange_cases
import pytest
import torch
from workers import Workers, started

from lightrft.config import BackendNotInstalledError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy, StrategyBase
from lightrft.strategy.registry import STRATEGIES, registered
from lightrft.strategy.utils.distributed_util import gather_inputs_object_for_inference
from lightrft.strategy.utils.parallel_utils import (
    _SeqAllToAll,
    get_sequence_parallel_group,
    get_sequence_parallel_world_size,
)


@pytest.fixture
def workers():
    yield from started(2)


def test_importing_the_paths_imports_no_backend():
    paths = "deepspeed.deepspeed", "fsdp.fsdpv2", "sglang_utils", "utils.distributed_util", "utils.parallel_utils"
    imports = ", ".join(f"lightrft.strategy.{path}" for path in paths)
    code = f"import sys, {imports}; print([m for m in ('deepspeed', 'lightrft.fsdp', 'sglang', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "path", "class_name"),
    [("deepspeed", "deepspeed.deepspeed", "DeepspeedStrategy"), ("fsdp", "fsdp.fsdpv2", "FSDPV2Strategy")],
)
def test_the_class_of_a_strategy_is_the_registered_one(name, path, class_name):
    code = f"from lightrft.strategy.{path} import {class_name} as found"
    if name not in registered(STRATEGIES):
        with pytest.raises(BackendNotInstalledError, match=f"pip install 'lightrft-{name}'"):
            exec(code, {})  # noqa: S102
        return
    names = {}
    exec(code, names)  # noqa: S102
    assert issubclass(names["found"], StrategyBase) and names["found"].name == name


def test_a_path_has_no_other_attribute():
    with pytest.raises(ImportError, match="FSDPStrategy"):
        from lightrft.strategy.fsdp.fsdpv2 import FSDPStrategy  # noqa: F401


def test_without_sequence_parallelism_there_is_no_group():
    assert (get_sequence_parallel_group(), get_sequence_parallel_world_size()) == (None, 1)
    with FakeStrategy():
        assert (get_sequence_parallel_group(), get_sequence_parallel_world_size()) == (None, 1)


def test_without_a_group_the_exchange_is_the_identity():
    one, other = torch.randn(1, 4, 3, 2, requires_grad=True), torch.randn(1, 2, 3, 2, requires_grad=True)
    assert torch.equal(_SeqAllToAll.apply(None, 1, 2, one), one)
    outputs = _SeqAllToAll.apply(None, [1, 1], [2, 2], one, other)
    assert isinstance(outputs, tuple) and all(map(torch.equal, outputs, (one, other)))
    (3 * outputs[0]).sum().backward()
    assert torch.equal(one.grad, torch.full_like(one, 3))


def test_with_a_group_heads_and_positions_are_exchanged(workers: Workers):
    workers.run(exchange_cases.there_and_back)


def test_inputs_of_one_rank_stay_as_they_are():
    assert gather_inputs_object_for_inference(["prompt"], None) == ["prompt"]


def test_an_engine_for_a_reward_model_is_refused_with_what_to_use_instead():
    from lightrft.strategy.sglang_utils import get_sglang_engine

    with pytest.raises(UnsupportedOperationError, match=r"get_sglang_engine: .*'org/reward'.*use_engine=False"):
        get_sglang_engine("org/reward", engine_mem_util=0.4, tp_size=2)
