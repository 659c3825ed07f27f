"""Models written by FSDP2 for transformers to open, and read back into other layouts."""

import json
from pathlib import Path

import exports
import fsdp_cases
import imports
import preparing
import pytest
import torch
from llamas import llama
from safetensors.torch import load_file
from typer.testing import CliRunner
from workers import Workers

from lightrft_cli.main import app

transformers = pytest.importorskip("transformers")

SETTINGS = [{}, {"fsdp_shard_size": 1}, {"fsdp_cpu_offload": True}, {"bf16": True}]


def close(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    """Whether they differ by at most ``bound``."""
    return bool((got - wanted).abs().max() <= bound)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_saved_model_opens_in_transformers_and_loads_in_another_run(
    two: Workers, tmp_path: Path, settings: dict[str, object]
) -> None:
    bound = 2e-2 if "bf16" in settings else 1e-6
    (path, weights, logits), other = two.run(
        exports.saved, strategy="fsdp", path=str(tmp_path / "out"), save={"max_shard_size": 3000}, **settings
    )
    assert other[0] == path
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert close(opened(exports.TOKENS).logits, logits, bound)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())
    assert len(list(Path(path).glob("model-*-of-*.safetensors"))) > 2
    for got, found_logits, updated in two.run(exports.loaded, strategy="fsdp", path=path, **settings):
        assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())
        assert close(found_logits, logits, bound)
        assert 0 < max(float((updated[name] - tensor).abs().max()) for name, tensor in got.items()) < 0.02


def test_a_checkpoint_becomes_the_model_that_was_prepared(two: Workers, tmp_path: Path) -> None:
    weights, _ = two.run(exports.checkpointed, strategy="fsdp", path=str(tmp_path / "store"))
    out = tmp_path / "out"
    converted = CliRunner().invoke(app, ["convert", str(tmp_path / "store" / "t"), str(out), "--dtype", "float32"])
    assert converted.exit_code == 0, converted.output
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())


def test_parameters_of_one_element_are_saved(two: Workers, tmp_path: Path) -> None:
    weights, _ = two.run(fsdp_cases.saved, path=str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["layers.0.scale"].shape == (1,)
    assert all(torch.equal(weights[name], tensor) for name, tensor in written.items())


def test_shards_of_unequal_size_are_saved_as_full_tensors(three: Workers, tmp_path: Path) -> None:
    (path, weights, logits), *_ = three.run(exports.saved, strategy="fsdp", path=str(tmp_path / "out"), save={})
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())
    assert close(opened(exports.TOKENS).logits, logits, 1e-6)


@pytest.mark.parametrize("in_training", [True, False])
def test_from_pretrained_where_only_rank_0_gets_memory(two: Workers, tmp_path: Path, in_training: bool) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    first, second = two.run(
        exports.from_pretrained_on_rank_0, strategy="fsdp", path=str(tmp_path), in_training=in_training
    )
    assert (first[0], second[0]) == ({"cpu"}, {"meta"})
    for _, weights, buffers, logits in (first, second):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
        assert buffers.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(buffers[name], tensor) for name, tensor in model.named_buffers())
        assert close(logits, model(exports.TOKENS).logits, 1e-6)


def test_a_write_that_fails_on_one_rank_raises_on_all(two: Workers, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for kind, text, unchanged in two.run(exports.refused, strategy="fsdp", path=str(taken), call="save"):
        assert kind == "CheckpointError"
        assert str(taken) in text
        assert unchanged
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_damaged_file_is_found_before_anything_changes(two: Workers, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for kind, text, unchanged in two.run(exports.refused, strategy="fsdp", path=str(tmp_path), call="load"):
        assert kind == "CheckpointError"
        assert str(file) in text
        assert unchanged


@pytest.mark.parametrize("settings", [{}, {"fsdp_shard_size": 1}], ids=str)
def test_checkpoints_of_torch_distributed_checkpoint_are_loaded(
    two: Workers, tmp_path: Path, settings: dict[str, object]
) -> None:
    weights, _ = two.run(imports.wrote_dcp, path=str(tmp_path), **settings)
    for got, _, _ in two.run(exports.loaded, strategy="fsdp", path=str(tmp_path)):
        assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_with_an_adapter_is_saved_as_peft_and_transformers_open_it(
    two: Workers, tmp_path: Path, merge: bool
) -> None:
    exports.check_adapter_export(two, tmp_path, merge=merge, strategy="fsdp")


def test_a_vision_language_model_built_from_its_configuration_has_the_names_of_its_checkpoint(
    two: Workers, tmp_path: Path
) -> None:
    exports.vision().save_pretrained(tmp_path / "own")
    wanted = set(load_file(tmp_path / "own" / "model.safetensors"))
    names, path = two.run(exports.names, strategy="fsdp", path=str(tmp_path / "out"))[0]
    assert names == wanted
    assert set(load_file(Path(path) / "model.safetensors")) == wanted


def test_shared_parameters_and_a_models_own_saving_are_refused(two: Workers, tmp_path: Path) -> None:
    for said in two.run(preparing.refusals, strategy="fsdp", path=str(tmp_path / "out")):
        for critic in ("critic", "critic that does not train"):
            assert "Critic, which shares 20 with LlamaForCausalLM (backbone.embed_tokens.weight first)" in said[critic]
        assert "LlamaForCausalLM, which shares 1 with LlamaForCausalLM" in said["reference"]
        for saving in ("save_pretrained", "save_pretrained of a part", "save_pretrained after close"):
            assert (
                "got a prepared LlamaForCausalLM, of which each rank holds a part. Call strategy.save_model"
                in said[saving]
            )
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_model_trains_and_is_saved_as_it_is_uncompiled(two: Workers, tmp_path: Path) -> None:
    for plain, got, graphs in two.run(preparing.compiled, deadline=300, strategy="fsdp", path=str(tmp_path / "out")):
        assert got.keys() == plain.keys() and graphs > 0
        assert all(close(got[name], tensor, 1e-6) for name, tensor in plain.items())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain.keys()
