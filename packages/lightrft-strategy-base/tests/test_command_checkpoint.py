"""`lightrft checkpoint`."""

import errno

import pytest
import torch
from command_line import lightrft, listed, refused
from torch import nn

from lightrft.strategy import get_fake_strategy
from lightrft_cli import errors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of an actor, with a critic that only infers."""
    directory = tmp_path_factory.mktemp("saved")
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        actor, critic = nn.Linear(3, 2), nn.Linear(3, 1).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(actor.parameters())
        strategy.prepare((actor, optimizer, None), critic)
        for step in (1, 2):
            strategy.backward(actor(torch.ones(1, 3)).sum(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor)
            strategy.save_ckpt({"actor": actor, "critic": critic}, directory, tag=f"step{step}")
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy to damage."""
    import shutil

    return shutil.copytree(saved, tmp_path / "checkpoints")


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_list_has_tags_steps_and_sizes_oldest_first(directory):
    rows = listed("checkpoint", "list", directory)
    assert [(row["tag"], row["updates"], row["ranks"], row["models"]) for row in rows] == [
        ("step1", 1, 1, ["actor", "critic"]), ("step2", 2, 1, ["actor", "critic"]),
    ]  # fmt: skip
    assert rows[0]["size"] == sum(file.stat().st_size for file in (directory / "step1").glob("*.safetensors"))
    assert [line.split()[0] for line in lightrft("checkpoint", "list", directory).splitlines()] == [
        "tag",
        "step1",
        "step2",
    ]


def test_list_names_a_damaged_manifest(directory):
    flip(directory / "step1/manifest.json", 200)
    status = {row["tag"]: row["status"] for row in listed("checkpoint", "list", directory)}
    assert status == {"step2": "manifest intact", "step1": "manifest damaged"}


def test_show_has_what_is_in_the_newest(directory):
    shown = listed("checkpoint", "show", directory)
    assert (shown["tag"], shown["strategy"], shown["ranks"]) == ("step2", "fake", 1)
    assert shown["versions"]["torch"] == torch.__version__
    actor, critic = shown["models"]
    assert (actor["class"], actor["parameters"], actor["dtype"], actor["optimizer"]) == (
        "Linear",
        8,
        ["float32"],
        "AdamW",
    )
    assert (critic["parameters"], critic["dtype"], critic["updates"]) == (4, ["bfloat16"], None)
    assert "step1" in lightrft("checkpoint", "show", directory, "--tag=step1").splitlines()[0]
    assert listed("checkpoint", "show", directory / "step1")["tag"] == "step1"


def test_verify_reads_everything(directory):
    assert [row["intact"] for row in listed("checkpoint", "verify", directory)] == [True, True]
    flip(directory / "step1/rank-00000-of-00001.safetensors", -1)
    rows = listed("checkpoint", "verify", directory, code=1)
    assert [row["intact"] for row in rows] == [False, True]
    assert "does not match its checksum" in rows[0]["error"]
    assert lightrft("checkpoint", "verify", directory, "--tag=step2")
    assert "step1" in lightrft("checkpoint", "verify", directory / "step1", code=1)


def test_verify_finds_a_damaged_manifest_and_a_missing_file(directory):
    flip(directory / "step1/manifest.json", 200)
    (directory / "step2/rank-00000-of-00001.safetensors").unlink()
    errors = {row["tag"]: row["error"] for row in listed("checkpoint", "verify", directory, code=1)}
    assert "manifest.json" in errors["step1"] and "it is missing" in errors["step2"]


def test_a_file_that_the_system_refuses_to_open_is_not_called_damaged(directory):
    file = directory / "step1/rank-00000-of-00001.safetensors"
    file.unlink()
    file.symlink_to(file.name)  # leads to itself; unlike permissions, it stops root too
    error = listed("checkpoint", "verify", directory, code=1)[0]["error"]
    assert f"cannot open {file}: Too many levels of symbolic links" in error and "damaged" not in error
    refusal = refused("checkpoint", "show", directory / ("a" * 300))
    assert "expected a path that this user can open" in refusal and "File name too long. Check it" in refusal


def test_a_full_disk_is_told_with_its_remedy():
    error = OSError(errno.ENOSPC, "No space left on device", "/data/model.safetensors")
    assert errors._message(error) == (
        "expected to write its output, got: /data/model.safetensors: No space left on device. Free space, or write elsewhere"
    )


def test_verify_of_one_checkpoint_with_a_damaged_manifest(directory):
    flip(directory / "step1/manifest.json", 200)
    assert "manifest.json" in listed("checkpoint", "verify", directory / "step1", code=1)[0]["error"]


def test_a_missing_path_is_an_error_of_one_line(directory, tmp_path):
    assert "Available: step1, step2" in refused("checkpoint", "show", directory, "--tag=step3")
    assert "expected a directory of checkpoints" in refused("checkpoint", "list", tmp_path / "nothing")
    assert "expected a directory of checkpoints" in refused("checkpoint", "list", directory / "latest")
    (tmp_path / "empty").mkdir()
    assert "found none" in refused("checkpoint", "verify", tmp_path / "empty")
    assert "There are no checkpoints" in lightrft("checkpoint", "list", tmp_path / "empty")
    assert listed("checkpoint", "list", tmp_path / "empty") == []
