"""Models written by ZeRO for transformers to open, and read back; DeepSpeed's own checkpoints read in."""

from pathlib import Path

import exports
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


def close(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    """Whether they differ by at most ``bound``."""
    return bool((got - wanted).abs().max() <= bound)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_saved_model_opens_in_transformers_and_loads_in_another_run(
    two: Workers, tmp_path: Path, stage: int, bf16: bool
) -> None:
    settings = {"strategy": "deepspeed", "zero_stage": stage, "bf16": bf16}
    bound = 2e-2 if bf16 else 1e-6
    (path, weights, logits), _ = two.run(
        exports.saved, path=str(tmp_path / "out"), save={"max_shard_size": 3000}, **settings
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert close(opened(exports.TOKENS).logits, logits, bound)
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in weights.items())
    for got, found_logits, updated in two.run(exports.loaded, path=path, **settings):
        assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())
        assert close(found_logits, logits, bound)
        assert 0 < max(float((updated[name] - tensor).abs().max()) for name, tensor in got.items()) < 0.02


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoints_of_deepspeed_are_loaded_and_converted(
    two: Workers, tmp_path: Path, stage: int, bf16: bool
) -> None:
    settings = {"zero_stage": stage, "bf16": bf16}
    weights, _ = two.run(imports.wrote_deepspeed, path=str(tmp_path / "run"), **settings)
    for got, _, _ in two.run(exports.loaded, strategy="deepspeed", path=str(tmp_path / "run"), zero_stage=3 - stage):
        assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())
    llama().save_pretrained(tmp_path / "base")
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    )
    assert done.exit_code == 0, done.output
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in weights.items())


def test_a_missing_rank_is_named(two: Workers, tmp_path: Path) -> None:
    two.run(imports.wrote_deepspeed, path=str(tmp_path), zero_stage=2)
    lost = next((tmp_path / "step1").glob("*zero_pp_rank_1_*optim_states.pt"))
    lost.unlink()
    for kind, text, unchanged in two.run(
        exports.refused, strategy="deepspeed", path=str(tmp_path), call="load", zero_stage=2
    ):
        assert kind == "CheckpointError"
        assert "expected the files of 2 ranks" in text
        assert "found 1" in text
        assert unchanged


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_with_an_adapter_is_saved_as_peft_and_transformers_open_it(
    two: Workers, tmp_path: Path, merge: bool
) -> None:
    exports.check_adapter_export(two, tmp_path, merge=merge, strategy="deepspeed", zero_stage=3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shared_parameters_and_a_models_own_saving_are_refused(two: Workers, tmp_path: Path, stage: int) -> None:
    for said in two.run(preparing.refusals, strategy="deepspeed", path=str(tmp_path / "out"), zero_stage=stage):
        for critic in ("critic", "critic that does not train"):
            assert "Critic, which shares 20 with LlamaForCausalLM (backbone.embed_tokens.weight first)" in said[critic]
        assert "LlamaForCausalLM, which shares 1 with LlamaForCausalLM" in said["reference"]
        if stage == 3:
            for saving in ("save_pretrained", "save_pretrained of a part", "save_pretrained after close"):
                assert (
                    "got a prepared LlamaForCausalLM, of which each rank holds a part. Call strategy.save_model"
                    in said[saving]
                )
            for saving in ("state_dict", "state_dict after close"):
                assert "whose parameters ZeRO-3 has sharded. Save with strategy.save_model" in said[saving]
        else:
            assert said.keys() == {"critic", "critic that does not train", "reference"}  # each rank has the whole model
    assert len(list(tmp_path.iterdir())) == (0 if stage == 3 else 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_compiled_model_trains_and_is_saved_as_it_is_uncompiled(two: Workers, tmp_path: Path, stage: int) -> None:
    settings = {"strategy": "deepspeed", "zero_stage": stage}
    for plain, got, graphs in two.run(preparing.compiled, deadline=300, path=str(tmp_path / "out"), **settings):
        assert got.keys() == plain.keys() and graphs > 0
        assert all(close(got[name], tensor, 1e-6) for name, tensor in plain.items())
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain.keys()
