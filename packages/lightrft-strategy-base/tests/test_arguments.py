"""Wrong arguments of public methods: each is refused by an error with the call, what it expected, and what it got."""

import inspect
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from mistakes import BytesPath
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, ConfigError, LightRFTError
from lightrft.strategy import FakeStrategy, StrategyBase, get_strategy

WRONG = [5, -1, 1.5, "text", b"b", [], [1], {"a": 1}, object(), nn.Linear, torch.zeros(2), float("nan"), print]
"""Values that are wrong for most arguments."""
MISTAKES = {
    "setup_distributed": {"timeout": [5, "text", [], {"a": 1}]},
    "set_seed": {"seed": [None, -1, 2**32, 1.5, "42", b"b", True, [], torch.zeros(2), float("nan")]},
    "all_reduce": {"data": ["text", [1], None, object()], "op": [None, 5, "median", [], torch.zeros(2)]},
    "all_gather": {"data": ["text", [1], None, object()]},
    "create_optimizer": {
        "model": WRONG, "lr": [None, -1, "text", [], {}, object(), float("nan")], "weight_decay": ["text", None, [1]],
        "betas": [None, 5, "text", [], (), {}, [0.9]], "bogus": [1],
    },
    "prepare_model": {"is_training": WRONG, "shard_size": ["text", 1.5, True, 0, None], "reshard_after_forward": WRONG},
    "prepare_models_and_optimizers": {
        "actor": WRONG, "critic": [5, "text", [1], {}], "reward_models": [5, "text", [1]], "initial_model": [5, "text"],
        "args": [5, "text", [1], float("nan")], "max_steps": [None, 0, 1.5, "9", True, []],
    },
    "prepare_reward_model": {
        "reward_model": [None, *WRONG], "args": [5, "text", [1]], "max_steps": [None, 0, 1.5, "9", True, []],
    },
    "unwrap_model": {"model": [None, *WRONG]},
    "setup_dataloader": {
        "replay_buffer": [None, 5, object(), nn.Linear], "batch_size": [None, 0, -1, 1.5, "2", True, [], object()],
        "pin_memory": WRONG, "shuffle": WRONG, "collate_fn": [5, "text", [1]], "drop_last": WRONG,
        "sampler": [5, object()], "consumed_samples": [None, -1, 1.5, "2", True, []],
        "whole_updates": WRONG,
    },
    "plan_micro_batches": {
        "lengths": [
            None, 5, 1.5, "text", b"b", {"a": 1}, {1}, object(), nn.Linear, [0], [-1], [5], [1.5], ["1"], [True], [None], [[1]],
            [torch.tensor(1)], torch.ones(2), torch.ones(2, dtype=torch.bool), torch.tensor(1), torch.tensor([[1]]),
            np.ones(2), np.array([[1]]), np.array(["1"]),
        ],
        "max_tokens": [None, 0, -1, 1.5, "2", True, [], object(), float("nan"), torch.tensor(4)], "padded": [None, *WRONG],
    },
    "token_log_probs": {
        "model": [None, *WRONG], "input_ids": [None, *WRONG], "attention_mask": [5, "text", [1], {}],
        "targets": [5, "text", [1], torch.zeros(2)], "temperature": [None, 0, -1, "text", [], True, float("nan")],
        "entropy": WRONG, "labels": [torch.zeros(1, 3)],
    },
    "backward": {"loss": [None, 5, "text", object()], "model": WRONG, "optimizer": WRONG, "retain_graph": WRONG},
    "optimizer_step": {"optimizer": WRONG, "model": WRONG, "scheduler": ["text", 5, object()], "boundary": WRONG},
    "moving_average": {
        "model": WRONG, "model_ema": WRONG, "beta": [None, "text", [], {}, True, 1.0, -0.1, float("nan")],
        "device": ["text", object(), [], 1.5],
    },
    "maybe_offload_optimizer": {"optimizer": [None, *WRONG]},
    "maybe_load_optimizer": {"optimizer": [None, *WRONG], "device": ["text", object(), 1.5]},
    "offload_model": {"empty_cache": WRONG},
    "save_ckpt": {
        "model": [None, *WRONG], "save_dir": [None, 5, b"b", [], nn.Linear, "~nobody-of-this-name/x"],
        "tag": [5, b"b", [], {"a": 1}, ""], "max_num": [None, 0, 1.5, "2", []], "max_mem": [None, 0, "2", [], float("nan")],
        "client_state": [object(), torch.zeros(2)], "save_latest": WRONG, "optimizer": WRONG,
        "scheduler": ["text", 5, object(), nn.Linear], "keep": ["best", 5, [1], [""]],
    },
    "load_ckpt": {
        "model": [None, *WRONG], "load_dir": [None, 5, b"b", [], "~nobody-of-this-name/x"], "tag": [5, b"b", []],
        "load_module_strict": WRONG, "load_optimizer_states": WRONG, "load_lr_scheduler_states": WRONG,
        "load_module_only": WRONG, "optimizer": WRONG, "scheduler": ["text", 5],
    },
    "save_model": {
        "model": [None, *WRONG], "tokenizer": ["tokenizer", 5, [], nn.Linear], "output_dir": [None, 5, b"b", []],
        "processor": ["processor", 5, object()], "dtype": ["bf16", 5, []], "max_shard_size": [None, "big", -1, []],
        "merge_adapters": WRONG,
    },
    "load_model": {
        "model": [None, *WRONG], "path": [None, 5, b"b", [], "org/name"], "strict": WRONG, "allow_pickle": WRONG,
    },
    "full_parameters": {"model": [None, *WRONG], "bucket_bytes": [0, "text", 1.5, []], "dtype": ["bf16", 5, []]},
    "setup_inference_engine": {
        "args": [5, "text", [1], {"pretrain": 5}], "engine_type": [5, "", "fak", []], "actor": [5, "text", []],
    },
    "log": {"metrics": [None, 5, "text", [1], {5: 1}, {"loss": "text"}, {"step": 1}], "step": [None, -1, 1.5, "text", True]},
    "gather_and_generate": {
        "all_images": [5, "text", object()], "sleep_engine": WRONG, "images_num": [5, "text"], "all_videos": [5, "text"],
        "videos_num": [5, "text"],
    },
}  # fmt: skip
CASES = [(call, name, value) for call, of in MISTAKES.items() for name, values in of.items() for value in values]


@pytest.fixture(scope="module")
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1, engine_type="fake") as made:
        yield made


@pytest.fixture(scope="module")
def given(strategy, tmp_path_factory):
    """Right arguments of each call."""
    folder = tmp_path_factory.mktemp("arguments")
    model, average = nn.Linear(2, 2), strategy.prepare(nn.Linear(2, 2))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    strategy.prepare((model, optimizer, None))
    strategy.save_ckpt(model, folder / "saved", tag="t")
    strategy.save_model(model, None, folder / "model")
    trained = {"model": model, "optimizer": optimizer}
    return {
        "all_reduce": {"data": 1.0},
        "create_optimizer": {"model": nn.Linear(1, 1)},
        "prepare_model": {"model": nn.Linear(1, 1)},
        "prepare_models_and_optimizers": {
            "actor": nn.Linear(1, 1), "critic": None, "reward_models": None, "initial_model": None, "args": None,
            "max_steps": 3,
        },
        "prepare_reward_model": {"reward_model": nn.Linear(1, 1)},
        "setup_dataloader": {"replay_buffer": [1, 2, 3], "batch_size": 1},
        "plan_micro_batches": {"lengths": [1, 2], "max_tokens": 4, "padded": True},
        "token_log_probs": {"model": model, "input_ids": torch.zeros(1, 3).long()},
        "log": {"metrics": {"loss": 1.0}, "step": 1},
        "backward": {"loss": model(torch.ones(1, 2)).sum(), **trained},
        "optimizer_step": trained,
        "moving_average": {"model": model, "model_ema": average},
        "maybe_load_optimizer": {"optimizer": optimizer},
        "offload_model": {"models": average},
        "save_ckpt": {"model": model, "save_dir": folder / "new"},
        "load_ckpt": {"model": model, "load_dir": folder / "saved"},
        "save_model": {"model": model, "tokenizer": None, "output_dir": folder / "other"},
        "load_model": {"model": model, "path": folder / "model"},
        "full_parameters": {"model": model},
        "gather_and_generate": {"sampling_params": {}, "all_prompt_token_ids": [[1]]},
    }  # fmt: skip


@pytest.mark.parametrize(("call", "name", "value"), CASES)
def test_a_wrong_argument_is_refused_by_name(strategy, given, call, name, value):
    if call == "gather_and_generate" and strategy.inference_engine is None:
        strategy.setup_inference_engine(None, "fake", given["save_ckpt"]["model"])
    arguments = {**given.get(call, {}), name: value}
    if name == "device":
        trained = next(prepared.trained for prepared in strategy._models if prepared.trained is not None)
        trained.updates += 1  # so that an average would move
        trained.optimizer_offloaded = True
    method = getattr(strategy, call)
    with pytest.raises(LightRFTError) as caught:
        _ = [*method(**arguments)] if inspect.isgeneratorfunction(method) else method(**arguments)
    message = str(caught.value)
    assert call in message or message.startswith(("engine", "there is no engine"))
    assert len(message) < 900


def test_every_public_method_with_arguments_is_tried():
    public = {name for name, value in vars(StrategyBase).items() if inspect.isfunction(value) and name[0] != "_"}
    without = {
        "make_backend", "close", "get_rank", "is_rank_0", "print", "report_memory", "sync_and_clear_cache", "prepare",
        "reload_model", "maybe_sleep_inference_engine", "wakeup_inference_engine", "update_engine_weights",
        "init_model_context", "saving_on_sigterm", "engine_generate_local",
    }  # fmt: skip
    assert public - without == set(MISTAKES)


class Long:
    def __repr__(self):
        return "long" * 1000


@pytest.mark.parametrize("arguments", [1, 2, 3])
def test_a_triple_that_was_passed_as_three_arguments_is_refused_before_anything_is_prepared(strategy, arguments):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ArgumentError, match=r"prepare: expected .*got AdamW. Pass .*prepare\(\(model, optimizer, None\)\)"
    ) as error:
        strategy.prepare(*(model, optimizer, None)[:arguments] if arguments > 1 else ([model, optimizer],))
    assert len(str(error.value)) < 300
    assert model.training
    assert model.weight.requires_grad
    strategy.prepare((model, optimizer, None))


def test_long_values_are_shortened(strategy):
    with pytest.raises(ArgumentError, match=r"prepare: expected a model") as error:
        strategy.prepare(Long())
    assert len(str(error.value)) < 400


def test_numbers_of_numpy_are_accepted(strategy):
    strategy.set_seed(np.int64(3))
    assert strategy.setup_dataloader([1, 2, 3], np.int64(2), shuffle=np.bool_(False)).batch_size == 2


def test_contexts_refuse_wrong_arguments(strategy):
    contexts = [
        (strategy.init_model_context("yes"), r"init_model_context: expected meta_init to be True or False, got str"),
        (strategy.saving_on_sigterm("x"), r"saving_on_sigterm: expected save to be a function.*got str \('x'\)"),
    ]
    for context, message in contexts:
        with pytest.raises(ArgumentTypeError, match=message):
            context.__enter__()


def test_the_name_of_a_model_on_the_hub_is_refused_with_what_to_do(strategy, given):
    with pytest.raises(FileNotFoundError, match=r"load_model: .*local directory .*org/name.*snapshot_download"):
        strategy.load_model(given["load_model"]["model"], "org/name")


# Paths


def test_the_home_directory_is_the_same_in_every_call(strategy, given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = given["save_ckpt"]["model"]
    assert strategy.save_ckpt(model, "~/checkpoints", tag="t") == tmp_path / "checkpoints/t"
    assert strategy.load_ckpt(model, "~/checkpoints", tag="t")[0] == tmp_path / "checkpoints/t"
    assert strategy.save_model(model, None, "~/model") == tmp_path / "model"
    assert strategy.load_model(model, "~/model").missing == ()
    assert strategy.load_ckpt(model, "checkpoints")[0] == tmp_path / "checkpoints/t"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model"]


def test_the_home_directory_in_pretrain(strategy, monkeypatch, tmp_path):
    from lightrft.strategy.rollout.rollout import _model_path

    monkeypatch.setenv("HOME", str(tmp_path))
    assert _model_path("~/model") == str(tmp_path / "model")
    assert _model_path(tmp_path) == str(tmp_path)
    assert _model_path("org/name") == "org/name"


# Names in get_strategy


def test_a_misspelled_name_is_refused():
    with pytest.raises(ConfigError, match=r"'zero_stag' is not a setting. Did you mean 'zero_stage'") as error:
        get_strategy({"strategy": "fake", "zero_stag": 3})
    frames = [entry.path.name for entry in error.traceback]
    assert "strategy_config.py" not in frames


def test_settings_that_a_strategy_refuses_are_refused_without_its_frames(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"expected a CUDA device, got none") as error:
        get_strategy({"strategy": "fake", "device": "cuda"})
    assert error.traceback[-1].path.name == "strategy.py"


@pytest.mark.parametrize(
    ("caught", "expected"), [("()", 1), ("ValueError", 2)], ids=["the script ends", "the script goes on"]
)
def test_under_torchrun_an_error_of_all_is_printed_once(tmp_path, caught, expected):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom lightrft.strategy import get_strategy\n"
        "try:\n    get_strategy({'strategy': 'fake', 'zero_stag': 3})\n"
        f"except {caught} as error:\n    print(error, file=sys.stderr)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.stderr.count("Did you mean 'zero_stage'") == expected, result.stderr
    assert (result.returncode == 0) == (expected == 2)


def test_other_unknown_names_are_warned_of_once():
    with pytest.warns(UserWarning, match=re.escape("'lora_rank', 'n3' are not settings")) as seen:
        get_strategy({"strategy": "fake", "lora_rank": 8, "n3": 1, "extra_args": {"mine": 1}, "pretrain": "x"}).close()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_strategy({"strategy": "fake", "extra_args": {"mine": 1}, "pretrain": "x", "engine_eager": True}).close()


@pytest.mark.parametrize(("path", "remedy"), [
    ("", "For the working directory, pass '.'"), ("run\0", "with a byte 0. Remove it"),
    ("run/" + "n" * 256 + "/t", "with a name of more than 255 bytes. Shorten it"),
    ("run\ud800", "with a character that no file name can have. Remove it"), (BytesPath(), "Pass os.fsdecode(path)"),
], ids=["empty", "byte 0", "long", "surrogate", "bytes"])  # fmt: skip
def test_a_path_that_cannot_be_has_the_remedy_for_its_fault(path, remedy):
    with get_strategy({"strategy": "fake"}) as made, pytest.raises(ArgumentError) as raised:
        made.save_ckpt(nn.Linear(1, 1), path)
    assert str(raised.value).startswith("save_ckpt: expected save_dir to be a path, got ")
    assert str(raised.value).endswith(remedy)
