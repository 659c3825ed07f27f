"""Models as directories: what is written, when it appears, and what becomes of what was there."""

import json
import shutil
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers
from export_models import TOKENS, llama, mixture_of_experts, same_logits, vision_language
from safetensors.torch import load_file

from lightrft.config import ArgumentError, CheckpointError, StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.export.atomic_directory import AtomicDirectory
from lightrft.strategy.models.weight_stream import converter_for_engines
from lightrft.strategy.storage import files

BUILDS = {"tied": llama, "untied": lambda: llama(tied=False), "experts": mixture_of_experts, "vision": vision_language}


@pytest.fixture
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1, weight_sync_bucket_bytes=1 << 20) as made:
        yield made


def trained(strategy, model):
    """``model`` in training, away from where it began."""
    model, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tensors_in(folder):
    """All tensors of a directory's files."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", BUILDS)
def test_the_files_equal_those_of_save_pretrained(strategy, tmp_path, kind):
    BUILDS[kind]().save_pretrained(tmp_path / "begin")
    begun = transformers.AutoModelForImageTextToText if kind == "vision" else transformers.AutoModelForCausalLM
    for source in (BUILDS[kind](), begun.from_pretrained(tmp_path / "begin")):
        model = trained(strategy, source)
        strategy.save_model(model, None, tmp_path / "ours", max_shard_size="30KB")
        model.save_pretrained(tmp_path / "theirs")
        ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        assert config == json.loads((tmp_path / "theirs" / "config.json").read_text())
        assert same_logits(begun.from_pretrained(tmp_path / "ours"), model)


def test_files_have_at_most_the_size_that_was_asked_for_and_an_index(strategy, tmp_path):
    model = trained(strategy, llama())
    got = strategy.save_model(model, None, tmp_path / "out", max_shard_size=4000)
    sizes = [file.stat().st_size for file in got.glob("model-*-of-*.safetensors")]
    index = json.loads((got / "model.safetensors.index.json").read_text())
    assert len(sizes) > 3 and max(sizes) < 4000 + 2000  # and the header
    assert set(index["weight_map"]) == set(tensors_in(got))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_in(got).values())
    opened = transformers.AutoModelForCausalLM.from_pretrained(got)
    assert same_logits(opened, model)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


@pytest.mark.parametrize("size", ["five", -3, "3 parsecs", 0])
def test_invalid_sizes(strategy, tmp_path, size):
    with pytest.raises(ArgumentError, match="max_shard_size"):
        strategy.save_model(trained(strategy, llama()), None, tmp_path / "out", max_shard_size=size)


def test_the_type_is_that_in_which_the_model_computes_or_the_one_asked_for(tmp_path):
    for bf16, dtype, wanted in [(False, None, "float32"), (True, None, "bfloat16"), (True, torch.float32, "float32")]:
        with FakeStrategy(bf16=bf16, train_batch_size=1) as strategy:
            model = trained(strategy, llama())
            got = strategy.save_model(model, None, tmp_path / "out", dtype=dtype)
            assert {str(tensor.dtype) for tensor in tensors_in(got).values()} == {f"torch.{wanted}"}
            assert json.loads((got / "config.json").read_text())["dtype"] == wanted
            assert next(model.parameters()).dtype is torch.float32


def test_what_transformers_keeps_in_fp32_is_written_in_fp32(strategy, tmp_path):
    model = trained(strategy, llama())
    model._keep_in_fp32_modules_strict = {"q_proj"}
    got = tensors_in(strategy.save_model(model, None, tmp_path / "out", dtype=torch.bfloat16))
    assert {name for name, tensor in got.items() if tensor.dtype is torch.float32} == {
        tensor for tensor in got if "q_proj" in tensor
    }
    assert torch.equal(got["model.layers.0.self_attn.q_proj.weight"], model.model.layers[0].self_attn.q_proj.weight)


def test_tokenizer_processor_and_generation_config_are_saved_with_the_weights(strategy, tmp_path):
    class Writer:
        def __init__(self, name):
            self.name = name

        def save_pretrained(self, folder):
            (Path(folder) / self.name).write_text("{}")

    model = trained(strategy, llama())
    model.generation_config.max_new_tokens = 123
    got = strategy.save_model(model, Writer("tokenizer.json"), tmp_path / "out", processor=Writer("processor.json"))
    assert {"tokenizer.json", "processor.json", "config.json", "model.safetensors"} <= {
        path.name for path in got.iterdir()
    }
    assert transformers.GenerationConfig.from_pretrained(got).max_new_tokens == 123


def test_custom_code_is_copied(strategy, tmp_path, monkeypatch):
    code = tmp_path / "code"
    llama().save_pretrained(code)
    (code / "modeling_mine.py").write_text(
        textwrap.dedent("""
            from transformers import LlamaForCausalLM

            class Mine(LlamaForCausalLM):
                def forward(self, *args, **kwargs):
                    output = super().forward(*args, **kwargs)
                    output.logits = output.logits * 2
                    return output
        """)
    )
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}})
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(code, trust_remote_code=True)
    type(model).register_for_auto_class(
        "AutoModelForCausalLM"
    )  # transformers 4 does not for a configuration of its own
    got = strategy.save_model(trained(strategy, model), None, tmp_path / "out")
    assert json.loads((got / "config.json").read_text())["architectures"] == ["Mine"]
    assert (got / "modeling_mine.py").read_text() == (code / "modeling_mine.py").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(got, trust_remote_code=True)
    assert type(again).__name__ == "Mine" and same_logits(again, model)


def test_a_model_that_is_not_transformers_gives_its_weights(strategy, tmp_path):
    model = strategy.prepare_model(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    got = strategy.save_model(model, None, tmp_path / "out")
    assert [path.name for path in got.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensors_in(got)[name], tensor) for name, tensor in model.state_dict().items())


# Where and when


def test_an_older_model_is_replaced_and_other_files_stay(strategy, tmp_path):
    model, out = trained(strategy, llama()), tmp_path / "out"
    strategy.save_model(model, None, out, max_shard_size=4000)
    (out / "runs").mkdir()
    (out / "runs" / "log").write_text("mine")
    (out / "notes.txt").write_text("mine")
    strategy.save_model(model, None, out)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "runs", "notes.txt"}
    assert (out / "runs" / "log").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("instant", ["written", "moved away", "in place", "moving over"])
def test_the_next_export_completes_a_killed_one(strategy, tmp_path, instant):
    model, out, token = trained(strategy, llama()), tmp_path / "out", "0123456789abcdef"
    strategy.save_model(model, None, out)
    (out / "notes.txt").write_text("mine")
    writing, replaced = tmp_path / f".out.{token}.writing", tmp_path / f".out.{token}.replaced"
    shutil.copytree(out, writing)
    (writing / "notes.txt").unlink()
    if instant != "written":
        out.rename(replaced)
    if instant in ("in place", "moving over"):
        writing.rename(out)
    if instant == "moving over":
        (replaced / "config.json").unlink()
    (tmp_path / ".out.lightrft-lock").touch()
    strategy.save_model(model, None, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(out), model)


def test_a_model_does_not_replace_checkpoints(strategy, tmp_path):
    model = trained(strategy, llama())
    path = strategy.save_ckpt(model, tmp_path / "run")
    before = {file: file.read_bytes() for file in path.iterdir()}
    for target in (path, path.parent):
        with pytest.raises(CheckpointError, match=r"global_step0.* .*Use another path"):
            strategy.save_model(model, None, target)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="to hold no checkpoints"):
        strategy.save_model(model, None, path)
    assert all(tensor.read_bytes() == data for tensor, data in before.items() if tensor.name != "manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fixed", [False, True])
def test_foreign_files_are_kept_whatever_their_names(strategy, tmp_path, monkeypatch, fixed):
    monkeypatch.setattr(Path, "is_mount", lambda path: fixed)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], r=3))
    model, out = strategy.prepare_model(model), tmp_path / "out"
    strategy.save_model(model, None, out)
    mine = [out / name for name in ("my-lora.safetensors", "pytorch_model.bin", "adapter_model.md", "other/notes.txt")]
    (tmp_path / ".out.writing").mkdir()
    mine.append(tmp_path / ".out.writing" / "notes.txt")
    for path in mine:
        path.write_text("mine")
    strategy.save_model(model, None, out)
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)


def test_two_exports_to_one_directory_do_not_mix(strategy, tmp_path):
    model = trained(strategy, llama())
    first = AtomicDirectory(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"out to have one writer, got another process .*Use another path, or wait"
    ):
        strategy.save_model(model, None, tmp_path / "out")
    assert first.folder.is_dir()
    first.discard()
    assert not list(tmp_path.iterdir())
    strategy.save_model(model, None, tmp_path / "out")


def test_an_export_that_cannot_be_committed_restores_the_older_model(strategy, tmp_path, monkeypatch):
    model, out = trained(strategy, llama()), tmp_path / "out"
    strategy.save_model(model, None, out)
    rename = files.rename

    def refused(source, target):
        if source.name.endswith(".writing"):
            raise CheckpointError("no")
        rename(source, target)

    monkeypatch.setattr(files, "rename", refused)
    with pytest.raises(CheckpointError, match="no"):
        strategy.save_model(model, None, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(out), model)


def test_every_file_of_an_export_is_on_disk_before_it_appears(strategy, tmp_path, monkeypatch):
    synchronised = []
    synchronise = files.synchronise
    monkeypatch.setattr(files, "synchronise", lambda path: (synchronised.append(path), synchronise(path)))
    out = strategy.save_model(trained(strategy, llama()), None, tmp_path / "new" / "out")
    assert {path.name for path in synchronised} >= {path.name for path in out.iterdir()}
    assert {tmp_path, tmp_path / "new"} <= set(synchronised)


def test_a_failure_leaves_the_older_model_as_it_was(strategy, tmp_path, monkeypatch):
    class Refusing:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device", f"{folder}/tokenizer.json")

    model, out = trained(strategy, llama()), tmp_path / "out"
    strategy.save_model(model, None, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: No space left on device"):
        strategy.save_model(model, Refusing(), out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"Free space, or use another path"):
        strategy.save_model(model, None, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_cannot_be_renamed_is_written_in_place(strategy, tmp_path, monkeypatch):
    model, out = trained(strategy, llama()), tmp_path / "out"
    strategy.save_model(model, None, out, max_shard_size=4000)
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    strategy.save_model(model, None, out)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(out), model)


def test_settings_of_generation_that_transformers_refuses_are_named_before_anything_is_written(strategy, tmp_path):
    model = trained(strategy, llama())
    model.generation_config.update(do_sample=False, temperature=0.5)
    with pytest.raises(
        CheckpointError, match=r"(?s)generation_config of LlamaForCausalLM.*temperature.*set it to None"
    ):
        strategy.save_model(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_there_to_be_saved(strategy, tmp_path):
    with pytest.raises(StrategyError, match="save_model: expected a model that this strategy has prepared"):
        strategy.save_model(llama(), None, tmp_path / "out")
    model = trained(strategy, llama())
    strategy.offload_model(model)
    with pytest.raises(StrategyError, match="reload_model"):
        strategy.save_model(model, None, tmp_path / "out")


# Adapters


def with_adapters(strategy, build=llama, **settings):
    """A model with trained adapters, prepared, and its bare base model."""
    base = build()
    chosen = {"target_modules": ["q_proj", "down_proj"], "r": 2, **settings}
    model = peft.get_peft_model(build(), peft.LoraConfig(**chosen))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    model, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    return model.eval(), base


ADAPTERS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_adapters_are_saved_alone_and_peft_opens_them(strategy, tmp_path, settings):
    model, base = with_adapters(strategy, lambda: llama(tied=False), **settings)
    got = strategy.save_model(model, None, tmp_path / "out")
    assert {path.name for path in got.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert same_logits(peft.PeftModel.from_pretrained(base, got), model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_adapters_give_a_full_model_and_do_not_change_the_base(strategy, tmp_path, settings, tied):
    model, _ = with_adapters(strategy, lambda: llama(tied=tied), **settings)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    got = strategy.save_model(model, None, tmp_path / "out", merge_adapters=True)
    opened = transformers.AutoModelForCausalLM.from_pretrained(got)
    assert (opened(TOKENS).logits - model(TOKENS).logits).abs().max() < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


def test_merging_is_done_in_full_precision(tmp_path):
    with FakeStrategy(bf16=True, train_batch_size=1) as strategy:
        model, _ = with_adapters(strategy)
        got = tensors_in(strategy.save_model(model, None, tmp_path / "out", merge_adapters=True))
        wanted = model.merge_and_unload().state_dict()
        assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in got.items())


def test_several_adapters_have_folders_of_their_own(strategy, tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], r=3))
    model = strategy.prepare_model(model)
    got = strategy.save_model(model, None, tmp_path / "out")
    for folder, rank in ((got, 2), (got / "other", 3)):
        assert {tensor.shape[0] for name, tensor in tensors_in(folder).items() if "lora_A" in name} == {rank}
        assert peft.PeftConfig.from_pretrained(folder).r == rank


def test_adapters_that_were_activated_after_preparing_are_refused(strategy, tmp_path):
    model, _ = with_adapters(strategy)
    inner = strategy.unwrap_model(model)
    inner.add_adapter("other", inner.peft_config["default"])
    inner.set_adapter("other")
    with pytest.raises(UnsupportedOperationError, match=r"active when it was prepared \(default\), got other"):
        strategy.save_model(model, None, tmp_path / "out", merge_adapters=True)


def test_adapters_that_cannot_be_merged_are_refused_by_name(strategy, tmp_path):
    model, _ = with_adapters(strategy, lora_bias=True, target_modules=["q_proj"], build=lambda: llama(biases=True))
    with pytest.raises(UnsupportedOperationError, match=r"q_proj.*merge_and_unload"):
        strategy.save_model(model, None, tmp_path / "out", merge_adapters=True)
    assert list(tmp_path.iterdir()) == []


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_layers": 2, "token_dim": 16, "num_attention_heads": 1}
METHODS = [
    peft.PromptTuningConfig(**PROMPT),
    peft.PrefixTuningConfig(**{**PROMPT, "token_dim": 8}),
    peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2),
]
COMPUTED = [
    peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=16),
    peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=16),
]


def adapted(strategy, config):
    """A model with other adapters than LoRA, prepared."""
    model = peft.get_peft_model(llama(), config)
    model, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    return model.eval()


def name_of(config):
    return config.peft_type.value


@pytest.mark.parametrize("config", METHODS, ids=name_of)
def test_prompts_are_saved_alone_and_peft_opens_them(strategy, tmp_path, config):
    model = adapted(strategy, config)
    got = strategy.save_model(model, None, tmp_path / "out")
    opened = peft.PeftModel.from_pretrained(llama(), got).eval()
    with torch.no_grad():
        assert torch.equal(opened(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("config", METHODS, ids=name_of)
def test_prompt_learning_is_neither_merged_nor_streamed(strategy, tmp_path, config):
    model = adapted(strategy, config)
    with pytest.raises(UnsupportedOperationError, match=rf"got {name_of(config)}, which changes no weight"):
        strategy.save_model(model, None, tmp_path / "out", merge_adapters=True)
    prepared = strategy._models.find(model)
    with pytest.raises(UnsupportedOperationError, match=rf"got {name_of(config)}"):
        converter_for_engines(prepared.module, prepared.meta_model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", COMPUTED, ids=name_of)
def test_prompts_that_are_computed_are_refused_by_name(strategy, tmp_path, config):
    with pytest.raises(
        UnsupportedOperationError, match=rf"got {name_of(config)} \(default\), whose prompt is computed"
    ):
        strategy.save_model(adapted(strategy, config), None, tmp_path / "out")


# Compiled models


@pytest.mark.parametrize("compiled", ["model", "layer"])
def test_a_compiled_model_is_saved_under_its_own_names(strategy, tmp_path, compiled):
    model = llama()
    names = set(model.state_dict()) - {"lm_head.weight"}
    if compiled == "layer":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model = trained(strategy, model)
    assert tensors_in(strategy.save_model(model, None, tmp_path / "out")).keys() == names
    assert {name for bucket in strategy.full_parameters(model) for name, _ in bucket} == names
