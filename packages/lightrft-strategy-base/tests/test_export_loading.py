"""Weights read into prepared models: from Hugging Face directories, and from LightRFT's older checkpoints."""

import json
import pickle
import shutil
import sys
from pathlib import Path, PosixPath
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from export_models import llama, mixture_of_experts, same_logits, vision_language
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from lightrft.config import CheckpointError, CheckpointNotFoundError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.export.sources.torch_files import load_torch_file


@pytest.fixture
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1) as made:
        yield made


def other(build, **settings):
    """A model of the same kind with other weights."""
    model = build(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("build", [llama, mixture_of_experts, vision_language])
@pytest.mark.parametrize("size", ["5GB", "6KB"])
def test_a_directory_loads_into_a_model_that_was_built_or_loaded(strategy, tmp_path, build, size):
    wanted = build()
    wanted.save_pretrained(tmp_path, max_shard_size=size)
    other(build).save_pretrained(tmp_path / "other")
    for source in (other(build), type(wanted).from_pretrained(tmp_path / "other")):
        model = strategy.prepare_model(source)
        left = strategy.load_model(model, tmp_path)
        assert (left.missing, left.unexpected) == ((), ())
        assert same_logits(model, wanted)
    assert size == "5GB" or (tmp_path / "model.safetensors.index.json").exists()


def test_the_optimizer_stays_and_trains_the_new_weights(strategy, tmp_path):
    llama().save_pretrained(tmp_path)
    model = other(llama)
    optimizer = strategy.create_optimizer(model, lr=0.1)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    strategy.load_model(model, tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    strategy.backward(model(tokens, labels=tokens).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    moved = (model.lm_head.weight - llama().lm_head.weight).abs().max()
    assert 0 < moved < 0.2


def test_buffers_are_read_too(strategy, tmp_path):
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += 3
    norm.num_batches_tracked += 5
    save_file(norm.state_dict(), tmp_path / "model.safetensors")
    model = strategy.prepare_model(torch.nn.BatchNorm1d(2))
    strategy.load_model(model, tmp_path)
    assert torch.equal(model.running_mean, norm.running_mean) and model.num_batches_tracked == 5


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_names_must_match_unless_load_module_strict_is_off(strategy, tmp_path, what):
    wanted = llama()
    tensors = {name: tensor.clone() for name, tensor in wanted.state_dict().items() if name != "lm_head.weight"}
    name = "model.norm.weight" if what == "missing" else "model.more.weight"
    if what == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    model = strategy.prepare_model(other(llama))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{name}.*strict=False"):
        strategy.load_model(model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    left = strategy.load_model(model, tmp_path, strict=False)
    assert getattr(left, what) == (name,)
    assert torch.equal(model.model.embed_tokens.weight, wanted.model.embed_tokens.weight)
    assert torch.equal(
        model.model.norm.weight, (before if what == "missing" else wanted.state_dict())["model.norm.weight"]
    )


def test_a_shape_mismatch_always_raises_and_is_named(strategy, tmp_path):
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")
    model = strategy.prepare_model(other(llama))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"expected model\.norm\.weight to have shape \(16,\).*got \(5,\)"):
            strategy.load_model(model, tmp_path, strict=strict)


def test_a_second_name_of_a_tied_weight_is_known(strategy, tmp_path):
    wanted = llama()
    save_file({name: tensor.clone() for name, tensor in wanted.state_dict().items()}, tmp_path / "model.safetensors")
    model = strategy.prepare_model(other(llama))
    strategy.load_model(model, tmp_path)
    assert same_logits(model, wanted)


@pytest.mark.parametrize(
    "damage", ["cut short", "no shard", "not in the shard", "no header", "elsewhere", "no directory"]
)
def test_damage_is_found_before_anything_changes(strategy, tmp_path, damage):
    folder = tmp_path / "model"
    llama().save_pretrained(folder, max_shard_size="8KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    index = folder / "model.safetensors.index.json"
    if damage == "cut short":
        first.write_bytes(first.read_bytes()[:-10])
    elif damage == "no shard":
        first.unlink()
    elif damage == "not in the shard":
        shutil.copyfile(second, first)
    elif damage == "no header":
        first.write_bytes(b"\0" * 100)
    elif damage == "elsewhere":
        index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    else:
        shutil.rmtree(folder)
    named = {"elsewhere": index, "no directory": folder}.get(damage, first)
    model = strategy.prepare_model(other(llama))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((CheckpointError, CheckpointNotFoundError), match=str(named)):
        strategy.load_model(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_error_for_a_directory_without_weights_lists_its_files(strategy, tmp_path):
    (tmp_path / "step_3").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="step_3"):
        strategy.load_model(strategy.prepare_model(llama()), tmp_path)


def test_a_checkpoint_of_a_run_is_for_load_ckpt(strategy, tmp_path):
    model = strategy.prepare_model(llama())
    path = strategy.save_ckpt(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"load_ckpt.*lightrft convert"):
        strategy.load_model(model, path)


# Adapters


def adapted(weights=None):
    """A model with adapters."""
    base = llama(tied=False)
    if weights is not None:
        base.load_state_dict(weights)
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2))


def test_adapters_and_base_models_load_into_models_with_adapters(strategy, tmp_path):
    wanted, base = strategy.prepare_model(other(adapted)), other(llama, tied=False)
    strategy.save_model(wanted, None, tmp_path / "adapters")
    base.save_pretrained(tmp_path / "base")
    model = strategy.prepare_model(adapted())
    strategy.load_model(model, tmp_path / "adapters")
    ours, theirs = model.state_dict(), wanted.state_dict()
    trained = [name for name in ours if "lora" in name or "modules_to_save" in name]
    assert trained and all(torch.equal(ours[name], theirs[name]) for name in trained)
    assert not torch.equal(ours["base_model.model.model.norm.weight"], theirs["base_model.model.model.norm.weight"])
    strategy.load_model(model, tmp_path / "base")
    wanted_base = adapted(base.state_dict()).state_dict()
    assert all(torch.equal(ours[name], theirs[name] if name in trained else wanted_base[name]) for name in ours)


# Older checkpoints


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_torch_distributed_checkpoint(strategy, tmp_path):
    wanted = other(llama)
    dcp.save(wanted.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    model = strategy.prepare_model(other(llama))
    strategy.load_model(model, tmp_path)
    assert same_logits(model, wanted)
    data = next(tmp_path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{data.name}, got a file that is too short"):
        strategy.load_model(model, tmp_path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(tmp_path, variant):
    """Puts the bomb where a checkpoint of the kind has a pickle, and names that file."""
    bomb = Bomb(tmp_path / "ran")
    if variant == "torch.distributed.checkpoint's metadata":
        (tmp_path / ".metadata").write_bytes(pickle.dumps(bomb))
        return ".metadata"
    if variant == "its data":
        dcp.save(llama().state_dict(), checkpoint_id=tmp_path, no_dist=True)
        data = next(tmp_path.glob("*.distcp"))
        data.write_bytes(pickle.dumps(bomb).ljust(data.stat().st_size, b"."))
        return data.name
    if variant == "DeepSpeed's state":
        torch.save({"module": {}, "bomb": bomb}, tmp_path / "mp_rank_00_model_states.pt")
        return "mp_rank_00_model_states.pt"
    older = variant == "an older state dict"
    torch.save({"bomb": bomb}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not older)
    return "pytorch_model.bin"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "variant",
    ["torch.distributed.checkpoint's metadata", "its data", "DeepSpeed's state", "a state dict", "an older state dict"],
)
def test_a_malicious_file_executes_no_code(strategy, tmp_path, variant):
    name = hostile(tmp_path, variant)
    with pytest.raises(CheckpointError, match=name):
        strategy.load_model(strategy.prepare_model(llama()), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_member_of_an_enumeration_is_a_plain_value(tmp_path, monkeypatch):
    """As DeepSpeed's files have it, where Python 3.11.0 to 3.11.3 wrote them."""
    module = "deepspeed.runtime.zero.config"
    by_name = {"__module__": module, "__reduce__": lambda self: (getattr, (type(self), "weights"))}
    stage = type("ZeroStageEnum", (), by_name)
    for end in (9, 17, 22, None):
        monkeypatch.setitem(sys.modules, module[:end], SimpleNamespace(ZeroStageEnum=stage))
    torch.save({"stage": stage(), "weights": torch.ones(2)}, tmp_path / "state.pt")
    got = load_torch_file(tmp_path / "state.pt", allow_pickle=False)
    assert torch.equal(got["weights"], torch.ones(2))
    assert type(got["stage"]).__module__.startswith("lightrft")


@pytest.mark.parametrize("known", [Metadata, PosixPath, _get_layout], ids=lambda known: known.__name__)
def test_a_malicious_metadata_file_changes_no_class(strategy, tmp_path, known):
    state = pickle.dumps((None, {"poisoned": True}), protocol=2)[2:-1]
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x02c%s\n%s\n%sb." % (known.__module__.encode(), known.__name__.encode(), state)
    )
    with pytest.raises(
        CheckpointError,
        match=r"expected metadata of torch.distributed.checkpoint at .*\.metadata, got a file that cannot be read",
    ):
        strategy.load_model(strategy.prepare_model(llama()), tmp_path)
    assert not hasattr(known, "poisoned")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_names_no_files_elsewhere(strategy, tmp_path):
    for folder in ("here", "there"):
        dcp.save(llama().state_dict(), checkpoint_id=tmp_path / folder, no_dist=True)
    metadata = tmp_path / "here" / ".metadata"
    got = pickle.loads(metadata.read_bytes())
    for info in got.storage_data.values():
        info.relative_path = f"../there/{info.relative_path}"
    metadata.write_bytes(pickle.dumps(got))
    with pytest.raises(CheckpointError, match=r"expected .*\.metadata to name files in its own directory"):
        strategy.load_model(strategy.prepare_model(llama()), tmp_path / "here")


def test_a_pickle_is_read_only_where_that_is_allowed(strategy, tmp_path):
    wanted = other(llama)
    model = strategy.prepare_model(other(llama))
    torch.save(wanted.state_dict(), tmp_path / "pytorch_model.bin")
    strategy.load_model(model, tmp_path)
    assert same_logits(model, wanted)
    tensors = {**wanted.state_dict(), "bomb": Bomb(tmp_path / "ran")}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        strategy.load_model(model, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_needs_pickle_is_read_with_it(strategy, tmp_path):
    wanted = other(llama)
    torch.save(transformers.utils.ModelOutput(wanted.state_dict()), tmp_path / "pytorch_model.bin")
    model = strategy.prepare_model(other(llama))
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        strategy.load_model(model, tmp_path)
    strategy.load_model(model, tmp_path, allow_pickle=True)
    assert same_logits(model, wanted)


@pytest.mark.parametrize("older", [False, True], ids=["zip", "before torch 1.6"])
def test_state_dicts_in_one_file_or_in_several(strategy, tmp_path, older):
    wanted = other(llama)
    split_state_dict(wanted.state_dict(), tmp_path, older)
    model = strategy.prepare_model(other(llama))
    strategy.load_model(model, tmp_path)
    assert same_logits(model, wanted)


def split_state_dict(tensors, folder, older=False):
    """Files of at most ten tensors, and their index, as transformers wrote them."""
    names = list(tensors)
    parts = [names[begin : begin + 10] for begin in range(0, len(names), 10)]
    files = [f"pytorch_model-{number:05d}-of-{len(parts):05d}.bin" for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: tensors[name] for name in part}, folder / file, _use_new_zipfile_serialization=not older)
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return files


@pytest.mark.parametrize("damage", ["no shard", "not in the shard", "cut short", "no index", "no state dict"])
def test_damage_to_state_dicts_is_found_before_anything_changes(strategy, tmp_path, damage):
    files = split_state_dict(llama().state_dict(), tmp_path)
    first, second, index = tmp_path / files[0], tmp_path / files[1], tmp_path / "pytorch_model.bin.index.json"
    if damage == "no shard":
        first.unlink()
    elif damage == "not in the shard":
        shutil.copyfile(second, first)
    elif damage == "cut short":
        first.write_bytes(first.read_bytes()[:-100])
    elif damage == "no index":
        index.write_text("[")
    else:
        torch.save({"model": {}}, first)
    expected = {
        "no shard": f"{first}, found no such file",
        "not in the shard": f"in {first}, as listed in its index, found none",
        "cut short": f"expected a file of torch.save at {first}, got a file that cannot be read",
        "no index": f"expected an index of weights at {index}, got a file that cannot be read",
        "no state dict": f"expected {first} to hold only a state dict",
    }[damage]
    model = strategy.prepare_model(other(llama))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=expected):
        strategy.load_model(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("file", "contents", "expected"), [
    ("model.safetensors", b"{}", "expected a safetensors file at {}, got a file that cannot be read"),
    (".metadata", b"{}", "expected metadata of torch.distributed.checkpoint at {}, got a file that cannot be read"),
    ("mp_rank_00_model_states.pt", b"{}", "expected a file of torch.save at {}, got a file that cannot be read"),
    ("mp_rank_00_model_states.pt", {"state": 1}, "expected {} to be a file of a DeepSpeed checkpoint with the key 'module', got one without it"),
])  # fmt: skip
def test_a_file_of_another_format_is_named_with_the_expected_one(strategy, tmp_path, file, contents, expected):
    if isinstance(contents, bytes):
        (tmp_path / file).write_bytes(contents)
    else:
        torch.save(contents, tmp_path / file)
    with pytest.raises(CheckpointError, match=rf"{expected.format(tmp_path / file)}.*copy the directory again"):
        strategy.load_model(strategy.prepare_model(llama()), tmp_path)
