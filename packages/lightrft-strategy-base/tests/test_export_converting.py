"""`lightrft convert`: checkpoints made into models, without what trained them."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from export_models import TOKENS, llama, mixture_of_experts, same_logits
from safetensors.torch import load_file
from typer.testing import CliRunner

from lightrft.strategy import FakeStrategy
from lightrft.strategy.cli import app


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
    assert {it.name for it in wanted.iterdir()} == {it.name for it in (tmp_path / "out").iterdir()}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((wanted / name).read_text())
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_it_takes_the_checkpoint_and_the_model_that_are_named(strategy, tmp_path):
    actor, critic = trained(strategy, llama), trained(strategy, llama)
    strategy.save_ckpt({"actor": actor, "critic": critic}, tmp_path / "run", tag="first")
    with torch.no_grad():
        actor.lm_head.weight.zero_()
    strategy.save_ckpt({"actor": actor, "critic": critic}, tmp_path / "run", tag="second")
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert code == 1 and "actor, critic" in said and "--model" in said and not (tmp_path / "out").exists()
    for options in (["--tag", "first"], []):
        assert run(tmp_path / "run", tmp_path / "out", "--model", "actor", *options)[0] == 0
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert bool(found.lm_head.weight.any()) == bool(options)
    assert run(tmp_path / "run" / "first", tmp_path / "out", "--model", "critic")[0] == 0
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), critic)


def test_type_and_size_of_files_are_as_asked(strategy, tmp_path):
    strategy.save_ckpt(trained(strategy, llama), tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "4KB")[0] == 0
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert {it.dtype for file in files for it in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_stands_beside_the_weights_comes_from_the_base_model(strategy, tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "runs").mkdir()
    model = trained(strategy, llama)
    strategy.save_ckpt(model, tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out", "--base", base)[0] == 0
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {it.name for it in (tmp_path / "out").iterdir()} == names
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_a_base_model_that_does_not_fit_is_refused(strategy, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    strategy.save_ckpt(strategy.prepare_model(torch.nn.Linear(2, 2)), tmp_path / "run")
    code, said = run(tmp_path / "run", tmp_path / "refused", "--base", tmp_path / "base")
    assert code == 1 and "are missing" in said and "--base" in said
    assert not (tmp_path / "refused").exists()


def test_other_models_give_their_weights(strategy, tmp_path):
    model = strategy.prepare_model(torch.nn.Linear(2, 3))
    strategy.save_ckpt(model, tmp_path / "run")
    assert run(tmp_path / "run", tmp_path / "out")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], it) for name, it in model.state_dict().items())


def test_a_damaged_checkpoint_gives_no_model(strategy, tmp_path):
    path = strategy.save_ckpt(trained(strategy, llama), tmp_path / "run", tag="t")
    file = next(path.glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, said = run(tmp_path / "run", tmp_path / "out")
    assert code == 1 and file.name in said
    assert not (tmp_path / "out").exists()


def test_the_model_does_not_take_the_place_of_the_checkpoint(strategy, tmp_path):
    path = strategy.save_ckpt(trained(strategy, llama), tmp_path / "run")
    for output in (path, tmp_path / "run"):
        code, said = run(tmp_path / "run", output)
        assert code == 1 and "give another path" in said
    assert strategy.load_ckpt(trained(strategy, llama), tmp_path / "run")[0] == path


def test_the_command_is_installed(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", "from lightrft.strategy.cli import app; app()", "convert", tmp_path / "none", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1 and str(tmp_path / "none") in result.stderr
