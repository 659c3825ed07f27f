"""Tags, the newest checkpoint, rotation, and the limits of a store, in one process."""

import logging
from pathlib import Path

import pytest
from checkpoint_models import in_training, same, update, weights

from lightrft.config import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    StrategyError,
)
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.checkpoint.store import Store


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


def test_a_model_does_not_replace_another_one_under_the_same_tag(strategy, tmp_path):
    (actor, _), (critic, _) = in_training(strategy), in_training(strategy)
    strategy.save_ckpt(actor, tmp_path, tag="t")
    strategy.save_ckpt(actor, tmp_path, tag="t")
    with pytest.raises(StrategyError, match=r"would be replaced\. Save models together"):
        strategy.save_ckpt(critic, tmp_path, tag="t")


def test_saving_an_existing_tag_replaces_it_and_makes_it_the_newest(strategy, tmp_path):
    model, optimizer = in_training(strategy)
    for tag in ("a", "b", "a"):
        update(strategy, model, optimizer)
        strategy.save_ckpt(model, tmp_path, tag=tag)
    kept = weights(model)
    update(strategy, model, optimizer)
    assert strategy.load_ckpt(model, tmp_path)[0].name == "a"
    assert same(weights(model), kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]


def test_a_checkpoint_saved_without_save_latest_loads_only_by_its_tag(strategy, tmp_path):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="a")
    strategy.save_ckpt(model, tmp_path, tag="b", save_latest=False)
    assert strategy.load_ckpt(model, tmp_path)[0].name == "a"
    assert strategy.load_ckpt(model, tmp_path, tag="b")[0].name == "b"


def latest_of(folder):
    return (folder / "latest").read_text().strip()


def test_rotation_keeps_what_is_loaded_without_a_tag(strategy, tmp_path):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="a", max_num=1)
    (tmp_path / "latest").unlink()
    for tag in ("b", "c"):
        strategy.save_ckpt(model, tmp_path, tag=tag, max_num=1, save_latest=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "latest"]
    assert strategy.load_ckpt(model, tmp_path)[0].name == latest_of(tmp_path) == "a"
    strategy.save_ckpt(model, tmp_path, tag="d", max_num=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "latest"]


def test_latest_never_names_a_checkpoint_saved_without_save_latest(strategy, tmp_path):
    model, _ = in_training(strategy)
    for tag in ("a", "b"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    strategy.save_ckpt(model, tmp_path, tag="b", save_latest=False)
    assert latest_of(tmp_path) == "a"
    strategy.save_ckpt(model, tmp_path, tag="a", save_latest=False)
    assert not (tmp_path / "latest").exists()
    with pytest.raises(
        CheckpointNotFoundError, match=r"can be loaded without its tag in .*found none. Available: b, a"
    ):
        strategy.load_ckpt(model, tmp_path)


def spoil(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [spoil, Path.unlink])
@pytest.mark.parametrize("named", [True, False])
def test_a_damaged_newest_checkpoint_is_named_with_the_undamaged_ones(strategy, tmp_path, damage, named):
    model, _ = in_training(strategy)
    for tag in ("a", "b", "c"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    damage(tmp_path / "c" / "manifest.json")
    if not named:
        (tmp_path / "latest").unlink()
    for tag in (None, "c"):
        with pytest.raises(CheckpointError, match=r"c/manifest.json.*load another tag \(intact: a, b\)"):
            strategy.load_ckpt(model, tmp_path, tag=tag)
    assert strategy.load_ckpt(model, tmp_path, tag="b")[0].name == "b"


def test_an_older_damaged_checkpoint_is_skipped_with_a_warning(strategy, tmp_path, caplog):
    model, _ = in_training(strategy)
    for tag in ("a", "b"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    spoil(tmp_path / "a" / "manifest.json")
    with caplog.at_level(logging.WARNING):
        assert strategy.load_ckpt(model, tmp_path)[0].name == "b"
    assert f"cannot read {tmp_path / 'a' / 'manifest.json'}: its contents" in caplog.text


def test_a_directory_that_cannot_be_read_is_named(strategy, tmp_path, monkeypatch):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=rf"cannot list {tmp_path}: Permission denied"):
        strategy.load_ckpt(model, tmp_path)


def test_a_directory_that_is_not_a_checkpoint_is_not_replaced(strategy, tmp_path):
    model, _ = in_training(strategy)
    (tmp_path / "t").mkdir()
    with pytest.raises(
        CheckpointError, match=r"t to be new, or a checkpoint of these models that can be replaced: cannot read"
    ):
        strategy.save_ckpt(model, tmp_path, tag="t")


def test_a_replaced_checkpoint_counts_until_the_new_one_is_committed(strategy, tmp_path):
    model, optimizer = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="t")
    (tmp_path / "t").rename(tmp_path / ".t.replaced")  # killed between the two renames
    assert strategy.load_ckpt(model, tmp_path, tag="t")[0].name == ".t.replaced"
    update(strategy, model, optimizer)
    strategy.save_ckpt(model, tmp_path, tag="u")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "t", "u"]


def test_a_foreign_hidden_directory_is_not_cleaned_up(strategy, tmp_path):
    model, _ = in_training(strategy)
    (tmp_path / ".mine.writing").mkdir()
    (tmp_path / ".mine.writing" / "notes.txt").touch()
    strategy.save_ckpt(model, tmp_path, tag="t")
    assert (tmp_path / ".mine.writing" / "notes.txt").exists()


@pytest.mark.parametrize("tag", ["", ".", "..", ".x", "a/b", "/a", "latest", "a\0b", "a\nb", "a "])
def test_tags_that_are_not_directory_names_are_refused(strategy, tmp_path, tag):
    model, _ = in_training(strategy)
    for call in (strategy.save_ckpt, strategy.load_ckpt):
        with pytest.raises(ArgumentError, match=r"_ckpt: expected tag to be a directory name, got .*Use printable"):
            call(model, tmp_path, tag=tag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tag", [5, True, b"t", ["t"], Path("t"), object()])
def test_tags_that_are_not_strings_are_refused(strategy, tmp_path, tag):
    model, _ = in_training(strategy)
    for call in (strategy.save_ckpt, strategy.load_ckpt):
        with pytest.raises(ArgumentTypeError, match=r"_ckpt: expected tag to be a string, got"):
            call(model, tmp_path, tag=tag)


@pytest.mark.parametrize(
    "limits", [{"max_num": True}, {"max_num": 2.0}, {"max_num": "2"}, {"max_mem": True}, {"max_mem": "9"}]
)
def test_limits_that_are_not_numbers_are_refused(strategy, tmp_path, limits):
    model, _ = in_training(strategy)
    with pytest.raises(ArgumentTypeError, match=rf"save_ckpt: expected {next(iter(limits))} to be int.*, got"):
        strategy.save_ckpt(model, tmp_path, **limits)
    assert not list(tmp_path.iterdir())


def test_a_missing_tag_lists_the_available_ones(strategy, tmp_path):
    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path, tag="t")
    with pytest.raises(CheckpointNotFoundError, match=r"expected checkpoint 'u' in .*Available: t"):
        strategy.load_ckpt(model, tmp_path, tag="u")
    with pytest.raises(CheckpointNotFoundError, match="This is a checkpoint itself: load from"):
        strategy.load_ckpt(model, path)


def test_limits_below_one_are_refused(strategy, tmp_path):
    model, _ = in_training(strategy)
    for limits in ({"max_num": 0}, {"max_num": -1}, {"max_mem": 0}, {"max_mem": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(limits))):
            strategy.save_ckpt(model, tmp_path, **limits)
    assert not list(tmp_path.iterdir())


def test_a_store_lists_committed_checkpoints_oldest_first(strategy, tmp_path):
    model, _ = in_training(strategy)
    for tag in ("b", "c", "a"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    assert [checkpoint.tag for checkpoint in Store(Path(tmp_path)).committed()] == ["b", "c", "a"]
