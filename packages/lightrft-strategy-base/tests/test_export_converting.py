"""`lightrft convert`: checkpoints made into models, without what trained them."""

import json
import subprocess
import sys

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from export_models import TOKENS, llama, mixture_of_experts, same_logits
from safetensors.torch import load_file
from typer.testing import CliRunner

from lightrft.strategy import FakeStrategy
from lightrft_cli.main import app


def run(*arguments):
    """The command's exit code, and what it says."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1) as made:
        yield made


def trained(strategy, build):
    """A model after an update."""
    model = build()
    optimizer = strategy.create_optimizer(model, lr=0.01)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    strategy.backward(model(TOKENS, labels=TOKENS).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


@pytest.mark.parametrize("build", [llama, mixture_of_experts])
def test_a_checkpoint_becomes_the_model_that_save_model_writes(strategy, tmp_path, build):
    model = trained(strategy, build)
    strategy.save_ckpt(model, tmp_path / "run")
    wanted = strategy.save_model(model, None, tmp_path / "wanted")
    assert run(tmp_path / "run", tmp_path / "out") == (0, f"{tmp_path / 'out'}\n")
    assert {path.name for path in wanted.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((wanted / name).read_text())
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_the_named_checkpoint_and_model_are_converted(strategy, tmp_path):
    actor, critic = trained(strategy, llama), trained(strategy, llama)
    strategy.save_ckpt({"actor": actor, "critic": critic}, tmp_path / "run", tag="first")
    with torch.no_grad():
        actor.lm_head.weight.zero_()
    strategy.save_ckpt({"actor": actor, "critic": critic}, tmp_path / "run", tag="second")
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert code == 2 and "actor, critic" in said and "--model" in said and not (tmp_path / "out").exists()
    for options in (["--tag", "first"], []):
        assert run(tmp_path / "run", tmp_path / "out", "--model", "actor", *options)[0] == 0
        got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert bool(got.lm_head.weight.any()) == bool(options)
    assert run(tmp_path / "run" / "first", tmp_path / "out", "--model", "critic")[0] == 0
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), critic)


def test_dtype_and_size_of_files_are_configurable(strategy, tmp_path):
    strategy.save_ckpt(trained(strategy, llama), tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "4KB")[0] == 0
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_and_configuration_come_from_the_base_model(strategy, tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "runs").mkdir()
    model = trained(strategy, llama)
    strategy.save_ckpt(model, tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out", "--base", base)[0] == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


class Critic(torch.nn.Module):
    """A backbone of transformers' and a head of its own."""

    def __init__(self):
        super().__init__()
        self.model, self.value_head = llama(tied=False).model, torch.nn.Linear(16, 1)


def test_a_model_that_transformers_cannot_open_is_not_written(strategy, tmp_path):
    strategy.save_ckpt(strategy.prepare_model(Critic()), tmp_path / "run")
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert code == 2 and "got a Critic without one" in said and "--base" in said
    llama(tied=False).save_pretrained(tmp_path / "base")
    code, said = run(tmp_path / "run", tmp_path / "out", "--base", tmp_path / "base")
    assert code == 2 and "missing: lm_head.weight" in said and "unexpected: value_head.bias" in said
    assert "load_ckpt" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_directory_of_weights_alone_needs_the_right_base_model(strategy, tmp_path):
    model = llama()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    llama(biases=True).save_pretrained(tmp_path / "wrong")
    model.save_pretrained(tmp_path / "base")
    for directory in (tmp_path / "dcp", tmp_path / "bin"):
        out = tmp_path / f"{directory.name}-out"
        code, said = run(directory, out)
        assert code == 2 and str(directory) in said and "model.norm.weight" not in said and "--base" in said
        code, said = run(directory, out, "--base", tmp_path / "none")
        assert code == 2 and f"--base to be the directory of a transformers model, got {tmp_path / 'none'}" in said
        code, said = run(directory, out, "--base", tmp_path / "wrong")
        assert code == 2 and "q_proj.bias" in said and "--base" in said
        assert not out.exists()
        assert run(directory, out, "--base", tmp_path / "base")[0] == 0
        assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(out), model)


def test_a_critic_of_transformers_own_is_opened(strategy, tmp_path):
    config = llama().config
    config.num_labels = 1
    model = strategy.prepare_model(transformers.LlamaForTokenClassification(config).eval())
    strategy.save_ckpt(model, tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out")[0] == 0
    assert same_logits(transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out"), model)


def test_generation_settings_are_kept(strategy, tmp_path):
    model = llama()
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.temperature = 0.5  # without sampling: transformers would not write it anew
    strategy.save_ckpt(strategy.prepare_model(model), tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out")[0] == 0
    got = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (got["repetition_penalty"], got["temperature"]) == (1.5, 0.5)


# Adapters


def with_adapters():
    """A model with two adapters, one of which changes something."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], r=3))
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def test_a_model_with_adapters_becomes_adapters_that_peft_opens(strategy, tmp_path):
    model = strategy.prepare_model(with_adapters())
    strategy.save_ckpt(model, tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out")[0] == 0
    wanted = strategy.save_model(model, None, tmp_path / "wanted")
    assert _files(tmp_path / "out") == _files(wanted)
    for folder in ("", "other"):
        ours, theirs = (
            load_file(directory / folder / "adapter_model.safetensors") for directory in (tmp_path / "out", wanted)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert same_logits(opened, model) and not same_logits(opened, llama())


@pytest.mark.parametrize("name", [None, "organization/base"])
def test_converted_adapters_name_the_base_model_that_they_were_trained_on(strategy, tmp_path, name):
    model = with_adapters()
    model.peft_config["default"].base_model_name_or_path = name
    strategy.save_ckpt(strategy.prepare_model(model), tmp_path / "run")
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert (code, said.strip()) == (0, str(tmp_path / "out"))  # no warning of PEFT either
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_adapters_whose_configuration_is_not_known_are_refused(tmp_path):
    dcp.save(with_adapters().state_dict(), checkpoint_id=tmp_path / "run", no_dist=True)
    llama().save_pretrained(tmp_path / "base")
    code, said = run(tmp_path / "run", tmp_path / "out", "--base", tmp_path / "base")
    assert code == 2 and "It has adapters" in said and "load_model" in said


def test_adapters_alone_need_no_conversion(strategy, tmp_path):
    got = strategy.save_model(strategy.prepare_model(with_adapters()), None, tmp_path / "adapters")
    code, said = run(got, tmp_path / "out")
    assert code == 2 and "a directory of PEFT adapters, which needs no conversion" in said


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_on_request_as_in_save_model(strategy, tmp_path, settings, dtype):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False, **settings)
    model = peft.get_peft_model(llama(tied=False), config)
    model, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.01), None))
    strategy.save_ckpt(model, tmp_path / "run")
    code, said = run(tmp_path / "run", tmp_path / "out", "--merge-adapters", "--dtype", dtype)
    assert code == 0, said
    wanted = strategy.save_model(model, None, tmp_path / "wanted", merge_adapters=True, dtype=getattr(torch, dtype))
    assert _files(tmp_path / "out") == _files(wanted)
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (tmp_path / "out", wanted))
    assert ours.keys() == theirs.keys()
    assert all(
        tensor.dtype is theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_only_one_adapter_can_be_merged(strategy, tmp_path):
    for name, model, got in (("two", with_adapters(), "default, other"), ("none", llama(), "none")):
        strategy.save_ckpt(strategy.prepare_model(model), tmp_path / name)
        code, said = run(tmp_path / name, tmp_path / "out", "--merge-adapters")
        assert code == 2 and f"with {got}" in said and not (tmp_path / "out").exists()


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# What goes wrong


def test_a_damaged_checkpoint_is_not_converted(strategy, tmp_path):
    path = strategy.save_ckpt(trained(strategy, llama), tmp_path / "run", tag="t")
    file = next(path.glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert code == 2 and file.name in said
    assert not (tmp_path / "out").exists()


def test_the_model_does_not_replace_the_checkpoint(strategy, tmp_path):
    path = strategy.save_ckpt(trained(strategy, llama), tmp_path / "run")
    for output in (path, tmp_path / "run"):
        code, said = run(tmp_path / "run", output)
        assert code == 2 and "Use another path" in said
    assert strategy.load_ckpt(trained(strategy, llama), tmp_path / "run")[0] == path


def test_the_command_is_installed(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", "from lightrft_cli.main import app; app()", "convert", tmp_path / "none", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and str(tmp_path / "none") in result.stderr
