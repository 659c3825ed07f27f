"""What users touch: a change here is a change of the public interface, and deliberate."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightrft.strategy
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig
from lightrft.strategy.backend import ReplicatedBackend
from lightrft.strategy.backend.contract import Lifecycle, Offload, Preparing, Sharding, Step
from lightrft.strategy.moved_hooks import MOVED

NAMES = {
    "Completion", "EngineBase", "EngineCapabilities", "EngineRequest", "EngineStatus", "FakeStrategy", "LogProbs", "MicroBatch",
    "Prompt", "RolloutEngine", "Sampling", "StepResult", "StrategyBase", "StrategyConfig", "get_fake_strategy",
    "get_strategy", "is_actor", "is_engine", "linear_log_probs",
}  # fmt: skip

SIGNATURES = {
    "setup_distributed": "(timeout=None)",
    "log": "(metrics, step)",
    "set_seed": "(seed)",
    "create_optimizer": "(model, **settings)",
    "prepare": "(*models, is_rlhf=False)",
    "prepare_model": "(model, is_training=False, shard_size=-1, reshard_after_forward=True)",
    "prepare_models_and_optimizers": "(actor, critic, reward_models, initial_model, args, max_steps)",
    "prepare_reward_model": "(reward_model, args=None, max_steps=100000000)",
    "token_log_probs": "(model, input_ids, attention_mask=None, *, targets=None, temperature=1.0, entropy=False, **inputs)",
    "backward": "(loss, model, optimizer, *, denominator=None, retain_graph=False)",
    "optimizer_step": "(optimizer, model, scheduler=None, name='model', *, boundary=None)",
    "moving_average": "(model, model_ema, beta=0.992, device=None)",
    "setup_dataloader": "(replay_buffer, batch_size, pin_memory=False, shuffle=True, collate_fn=None, drop_last=True, sampler=None, consumed_samples=0, whole_updates=None)",
    "plan_micro_batches": "(lengths, *, max_tokens, padded)",
    "all_reduce": "(data, op='mean')",
    "all_gather": "(data)",
    "print": "(*message)",
    "is_rank_0": "()",
    "get_rank": "()",
    "unwrap_model": "(model)",
    "init_model_context": "(meta_init=False)",
    "report_memory": "(prefix='')",
    "sync_and_clear_cache": "()",
    "maybe_offload_optimizer": "(optimizer)",
    "maybe_load_optimizer": "(optimizer, device=None)",
    "offload_model": "(models, empty_cache=True)",
    "reload_model": "(models)",
    "full_parameters": "(model, bucket_bytes=None, dtype=None)",
    "setup_inference_engine": "(args=None, engine_type=None, actor=None)",
    "maybe_sleep_inference_engine": "()",
    "wakeup_inference_engine": "()",
    "engine_generate_local": "(sampling_params, prompt_token_ids=None, multi_modal_inputs=None)",
    "gather_and_generate": "(sampling_params, all_prompt_token_ids=None, all_prompts=None, all_images=None, sleep_engine=True, images_num=None, all_videos=None, videos_num=None)",
    "update_engine_weights": "(actor)",
    "save_ckpt": "(model, save_dir, tag=None, max_num=3, max_mem=1000, client_state=None, save_latest=True, optimizer=None, scheduler=None, *, keep=())",
    "load_ckpt": "(model, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True, load_lr_scheduler_states=True, load_module_only=False, optimizer=None, scheduler=None)",
    "save_model": "(model, tokenizer, output_dir, *, processor=None, dtype=None, max_shard_size='5GB', merge_adapters=False)",
    "load_model": "(model, path, *, strict=True, allow_pickle=False)",
    "saving_on_sigterm": "(save)",
    "get_ds_train_config": "(is_actor=False)",
    "get_ds_eval_config": "(offload=False)",
    "close": "()",
}  # fmt: skip
PROPERTIES = {
    "args", "world_size", "local_rank", "device", "accumulated_gradient", "inference_engine", "inference_engine_status",
    "engine_mp_group", "engine_dp_group", "stop_requested", "seed", "max_norm", "micro_train_batch_size",
    "train_batch_size", "bf16", "adam_offload", "zpg", "grad_accum_dtype", "overlap_comm", "engine_type",
}  # fmt: skip


def bare(function):
    """The signature without annotations and without self."""
    parameters = [
        p.replace(annotation=p.empty) for name, p in inspect.signature(function).parameters.items() if name != "self"
    ]
    return str(inspect.Signature(parameters))


def test_the_names_that_are_exported():
    assert set(lightrft.strategy.__all__) == NAMES


def test_the_methods_and_their_signatures():
    assert {name: bare(getattr(StrategyBase, name)) for name in SIGNATURES} == SIGNATURES


def test_nothing_else_is_public():
    attributes = {"name", "backend_class", "make_backend", "supported_settings", "capabilities"}
    public = {name for name in dir(StrategyBase) if not name.startswith("_")}
    assert public - attributes == set(SIGNATURES) | PROPERTIES


def test_every_public_member_says_what_it_does():
    for name in [*SIGNATURES, *PROPERTIES]:
        assert inspect.getdoc(getattr(StrategyBase, name)), name


def test_importing_loads_no_backend_no_model_library_and_nothing_that_takes_as_long_as_torch():
    heavy = "('deepspeed', 'vllm', 'sglang', 'transformers', 'torch.distributed.tensor', 'sympy')"
    code = f"import sys, lightrft.strategy; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_paths_that_lightrft_users_know():
    from lightrft.strategy.config import StrategyConfig
    from lightrft.strategy.fake_strategy import FakeStrategy as Fake
    from lightrft.strategy.fake_strategy import get_fake_strategy
    from lightrft.strategy.strategy import get_strategy
    from lightrft.strategy.strategy_base import StrategyBase as Base

    assert (Fake, Base) == (FakeStrategy, StrategyBase)
    assert StrategyConfig is lightrft.strategy.StrategyConfig
    assert get_fake_strategy is lightrft.strategy.get_fake_strategy
    assert get_strategy is lightrft.strategy.get_strategy


@pytest.mark.parametrize("hook", sorted(MOVED))
def test_a_strategy_that_overrides_a_hook_of_0_1_is_refused_with_its_new_name(hook):
    with pytest.raises(TypeError, match=rf"Old.{hook}: .*override {MOVED[hook]} there, and set backend_class of Old"):
        type("Old", (StrategyBase,), {hook: lambda self: None})


def test_honours_is_called_supported_settings():
    with pytest.raises(TypeError, match=r"Old.honours: .*supported_settings"):
        type("Old", (StrategyBase,), {"honours": frozenset()})


def test_former_names_of_capabilities_work_with_a_warning():
    class Backend(ReplicatedBackend):
        capabilities = frozenset({"adoption", "uneven_modules", "mine"})

    strategy = type("Own", (FakeStrategy,), {"backend_class": Backend})(StrategyConfig())
    with strategy, pytest.warns(DeprecationWarning, match="'adoption' is called 'unprepared_models'") as warned:
        assert strategy.capabilities == {"unprepared_models", "rank_dependent_modules", "mine"}
    assert {Path(each.filename).name for each in warned} == {Path(__file__).name}


def test_every_hook_that_moved_is_a_hook_of_a_backend():
    hooks = {name for moved in MOVED.values() for name in moved.split(" or ")}
    assert hooks <= set(dir(ReplicatedBackend))


def test_every_hook_is_documented_in_the_contract():
    hooks = {name for name in vars(ReplicatedBackend) if not name.startswith("_")}
    documented = {name: group for group in (Lifecycle, Preparing, Step, Sharding, Offload) for name in vars(group)}
    assert hooks <= set(documented)
    assert [name for name in hooks if not inspect.getdoc(vars(documented[name])[name])] == []


def test_a_type_checker_knows_the_return_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
from typing import assert_type
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from lightrft.strategy import StrategyBase

def check(strategy: StrategyBase, model: nn.Linear, optimizer: AdamW, scheduler: LambdaLR, loss: torch.Tensor) -> None:
    assert_type(strategy.prepare(model), nn.Linear)
    assert_type(strategy.prepare((model, optimizer, scheduler)), tuple[nn.Linear, AdamW, LambdaLR])
    assert_type(strategy.prepare((model, optimizer, None), model), tuple[tuple[nn.Linear, AdamW, None], nn.Linear])
    assert_type(strategy.prepare_model(model), nn.Linear)
    assert_type(strategy.all_reduce(loss), torch.Tensor)
    assert_type(strategy.all_reduce(1.5), float)
    assert_type(strategy.all_reduce(1, "sum"), int)
    assert_type(strategy.all_gather(2), torch.Tensor)
    strategy.all_reduce("loss")  # refused
    strategy.all_gather([loss])  # refused
"""
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}", str(script)],
        capture_output=True,
        text=True,
    )
    refused = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert [int(line.split(":")[1]) for line in refused] == [18, 19], result.stdout + result.stderr
