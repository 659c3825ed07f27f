"""Names of one weight in checkpoints of all versions, and what a sync must deliver."""

import pytest
import torch
from safetensors.torch import save_file

from lightrft.config import EngineError
from lightrft.engines.expected_weights import delivered_shapes, expected_shapes, stored_shapes
from lightrft.engines.weight_names import canonical, sender_names

ONE = torch.Size([1])


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.layers.0.mlp.up_proj.weight"], "layers.0.mlp.up_proj.weight"),
        (
            ["model.model.layers.0.norm.weight", "_orig_mod.model.layers.0._checkpoint_wrapped_module.norm.weight",
             "module.model.layers.0.norm.weight", "model.layers.0._fsdp_wrapped_module.norm.weight"],
            "layers.0.norm.weight",
        ),
        (
            ["model.layers.1.norm.weight", "language_model.model.layers.1.norm.weight", "model.language_model.layers.1.norm.weight"],
            "layers.1.norm.weight",
        ),
        (["visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"], "visual.blocks.0.attn.qkv.weight"),
        (["lm_head.weight", "language_model.lm_head.weight"], "lm_head.weight"),
    ],
    ids=["plain", "wrapped", "text layers", "vision tower", "head"],
)  # fmt: skip
def test_one_weight_has_one_canonical_name(names, wanted):
    assert {canonical(name) for name in names} == {wanted}


def test_a_prefix_inside_a_name_stays():
    assert canonical("visual.model.norm.weight") == "visual.model.norm.weight"
    assert canonical("model.submodule.weight") == "submodule.weight"


def test_a_sender_with_another_version_is_understood():
    stored = ["model.language_model.norm.weight", "model.visual.patch_embed.proj.weight", "lm_head.weight"]
    sent = ["model.norm.weight", "visual.patch_embed.proj.weight", "lm_head.weight"]
    assert sender_names(stored, sent) == dict(zip(stored, sent, strict=True))


def test_a_weight_that_the_sender_lacks_keeps_its_name():
    assert sender_names(["model.norm.weight"], ["model.other.weight"]) == {"model.norm.weight": "model.norm.weight"}


@pytest.mark.parametrize("side", ["stored", "sent"])
def test_two_names_with_one_canonical_name_are_refused(side):
    twice = ["model.norm.weight", "language_model.model.norm.weight"]
    arguments = (twice, []) if side == "stored" else ([], twice)
    with pytest.raises(EngineError, match=r"expected different names .*, got .* both become norm\.weight"):
        sender_names(*arguments)


def test_a_sync_delivers_what_is_stored_without_what_engines_compute():
    stored = dict.fromkeys(
        ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.mtp.weight"], ONE
    )
    assert list(delivered_shapes(stored, tied=False)) == ["model.norm.weight", "lm_head.weight", "model.mtp.weight"]
    assert list(delivered_shapes(stored, tied=True, ignored=[r"^model\.mtp"])) == ["model.norm.weight"]


def test_delivered_weights_have_the_names_of_the_sender():
    delivered = {"language_model.model.norm.weight": ONE, "visual.merger.weight": ONE}
    assert list(expected_shapes(delivered, ["model.norm.weight"])) == ["model.norm.weight", "visual.merger.weight"]


def test_shapes_are_read_from_all_files_of_a_directory(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(())}, tmp_path / "model-00002-of-00002.safetensors")
    assert stored_shapes(tmp_path) == {"a": torch.Size([2, 3]), "b": torch.Size([])}


def test_the_index_says_which_files_are_the_model(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"other": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert stored_shapes(tmp_path) == {"a": torch.Size([2])}
    save_file({"b": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert stored_shapes(tmp_path) == {"b": torch.Size([4])}


def test_a_directory_without_safetensors_has_no_shapes(tmp_path):
    assert stored_shapes(tmp_path) is None
