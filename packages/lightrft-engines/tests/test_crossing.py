"""Every strategy with every engine that is installed: after training and a sync, greedy tokens are those of transformers.

``-k ENGINE`` chooses one, where an environment has several.
"""

import importlib.util
from functools import partial

import pytest

pytest.importorskip("transformers", reason="needs transformers")

from engine_cases import adapters_arrive_merged, must_ask_alike, smollm2, smollm2_path, sync_and_compare
from workers import one, two

__all__ = ["one", "smollm2_path", "two"]  # fixtures

ENGINES = ["transformers", "vllm", "sglang"]
SHARED = ["vllm", "sglang"]
"""Those that run over several ranks."""
STRATEGIES = {"fsdp": {"strategy": "fsdp"}, "zero3": {"strategy": "deepspeed", "zero_stage": 3}}
SECONDS = 400.0
"""For engines that take a minute to start on a busy machine."""


def require(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_trains_and_the_engine_follows(one, engine):
    require(engine)
    assert one.run(sync_and_compare, engine=engine, strategy="fake", deadline=SECONDS) == [3]


@pytest.mark.parametrize("engine", ENGINES)
def test_smollm2_trains_and_the_engine_follows(one, engine, smollm2_path):
    require(engine)
    settings = {"pretrain": smollm2_path, "engine_kv_cache_bytes": 2**26, "engine_max_model_len": 512}
    build = partial(smollm2, smollm2_path)
    assert one.run(sync_and_compare, engine=engine, strategy="fake", build=build, deadline=SECONDS, **settings) == [3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_and_an_engine_each_follows(two, engine, strategy):
    require(engine, f"lightrft.{STRATEGIES[strategy]['strategy']}")
    assert two.run(sync_and_compare, engine=engine, deadline=SECONDS, **STRATEGIES[strategy]) == [3, 3]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", SHARED)
def test_two_ranks_train_and_an_engine_over_both_follows(two, engine, strategy):
    require(engine, f"lightrft.{STRATEGIES[strategy]['strategy']}")
    settings = {"engine_tp_size": 2, **STRATEGIES[strategy]}
    assert two.run(sync_and_compare, engine=engine, deadline=SECONDS, **settings) == [3, 3]


@pytest.mark.parametrize("engine", SHARED)
def test_ranks_that_share_an_engine_check_their_requests_and_see_its_state(two, engine):
    require(engine, "lightrft.fsdp")
    two.run(must_ask_alike, engine=engine, strategy="fsdp", deadline=SECONDS)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_trains_adapters_and_the_engine_follows(one, engine):
    require(engine, "peft")
    one.run(adapters_arrive_merged, engine=engine, strategy="fake", deadline=SECONDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ["transformers"])
def test_two_ranks_train_adapters_and_an_engine_each_follows(two, engine, strategy):
    require(engine, "peft", f"lightrft.{STRATEGIES[strategy]['strategy']}")
    two.run(adapters_arrive_merged, engine=engine, deadline=SECONDS, **STRATEGIES[strategy])


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("engine", SHARED)
def test_a_rank_with_text_and_a_rank_with_images_generate_together(two, engine, share, tmp_path):
    require(engine, "lightrft.fsdp", "PIL")
    from tiny_vision import text_beside_pictures

    two.run(text_beside_pictures, engine=engine, folder=tmp_path, engine_tp_size=share, deadline=SECONDS)
