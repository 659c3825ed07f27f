"""Directories of checkpoints that others use too: two runs, links, files of somebody's, and what cannot be removed."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from lightrft.config import CheckpointError, LightRFTError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint import format
from lightrft.strategy.checkpoint.save_checkpoint import TagWriter
from lightrft.strategy.storage import files
from lightrft.strategy.storage.locks import Lock, holding


@pytest.fixture
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1) as made:
        yield made


@pytest.fixture
def model(strategy):
    return strategy.prepare_model(nn.Linear(3, 2))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Links


def test_links_are_neither_cleaned_up_nor_rotated_nor_replaced(strategy, model, tmp_path):
    elsewhere = strategy.save_ckpt(model, tmp_path / "elsewhere", tag="t")
    store = tmp_path / "store"
    strategy.save_ckpt(model, store, tag="a")
    for name in ("t", ".b.writing", ".c.replaced", ".d.removing"):
        (store / name).symlink_to(elsewhere)
    strategy.save_ckpt(model, store, tag="e", max_num=1)
    assert names(store) == [".b.writing", ".c.replaced", ".d.removing", "e", "latest", "t"]
    assert names(elsewhere) == ["manifest.json", "rank-00000-of-00001.safetensors"]
    with pytest.raises(CheckpointError, match=r"store/t .*symbolic link. Use another tag or directory, or remove it"):
        strategy.save_ckpt(model, store, tag="t")
    assert strategy.load_ckpt(model, store, tag="t")[0] == store / "t"


# What cannot be removed


def test_a_path_that_cannot_be_removed_is_named_in_a_warning(strategy, model, tmp_path, monkeypatch, caplog):
    strategy.save_ckpt(model, tmp_path, tag="a")
    shutil.copytree(tmp_path / "a", tmp_path / ".x.writing")
    unlink = Path.unlink

    def refused(path, missing_ok=False):
        if path.name.startswith("rank-"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with caplog.at_level(logging.WARNING):
        for tag in ("b", "b", "c"):
            strategy.save_ckpt(model, tmp_path, tag=tag, max_num=1)
    for name in (".x.writing", ".b.replaced", ".a.removing"):
        assert any(
            f"fix {tmp_path / name}" in message and "Permission denied" in message for message in caplog.messages
        )
    assert strategy.load_ckpt(model, tmp_path)[0].name == "c"
    monkeypatch.undo()
    strategy.save_ckpt(model, tmp_path, tag="d", max_num=1)
    assert names(tmp_path) == ["d", "latest"]


# Files of somebody's


def test_foreign_files_in_a_checkpoint_are_kept_when_it_is_removed(strategy, model, tmp_path, caplog):
    path = strategy.save_ckpt(model, tmp_path, tag="a")
    (path / "notes.txt").write_text("mine")
    strategy.save_ckpt(model, tmp_path, tag="a")
    assert names(path) == ["manifest.json", "notes.txt", "rank-00000-of-00001.safetensors"]
    with caplog.at_level(logging.WARNING):
        strategy.save_ckpt(model, tmp_path, tag="b", max_num=1)
    assert names(tmp_path) == ["a", "b", "latest"]
    assert names(path) == ["notes.txt"]
    assert f"{path} was removed, except files" in caplog.text


@pytest.mark.parametrize("instant", ["moved away", "given back"])
def test_foreign_files_are_kept_after_a_killed_rotation(strategy, model, tmp_path, instant):
    path = strategy.save_ckpt(model, tmp_path, tag="a")
    (path / "notes.txt").write_text("mine")
    path.rename(tmp_path / ".a.removing")
    if instant == "given back":
        path.mkdir()
        (tmp_path / ".a.removing" / "notes.txt").rename(path / "notes.txt")
    strategy.save_ckpt(model, tmp_path, tag="b")
    assert names(tmp_path) == ["a", "b", "latest"]
    assert names(path) == ["notes.txt"]


# Two writers


def test_a_save_in_progress_in_another_process_is_left_alone(strategy, model, tmp_path):
    other = TagWriter(tmp_path, "t")
    other.begin("token", {})
    strategy.save_ckpt(model, tmp_path, tag="u", max_num=1)
    assert (other.folder / "token").read_text() == "token"
    with pytest.raises(
        CheckpointError, match=r"/t to have one writer, got another process .* holds .*Use a directory for each run"
    ):
        strategy.save_ckpt(model, tmp_path, tag="t")
    assert (other.folder / "token").read_text() == "token"
    other.end()
    strategy.save_ckpt(model, tmp_path, tag="t")
    assert names(tmp_path) == ["latest", "t", "u"]


def test_two_processes_write_latest_one_after_the_other(strategy, model, tmp_path, monkeypatch, caplog):
    strategy.save_ckpt(model, tmp_path, tag="a")
    replace_text = files.replace_text

    def meanwhile(path, text):
        with holding(tmp_path, "latest") as alone:
            assert not alone
        replace_text(path, text)

    monkeypatch.setattr(files, "replace_text", meanwhile)
    strategy.save_ckpt(model, tmp_path, tag="b")
    assert not caplog.messages
    assert names(tmp_path) == ["a", "b", "latest"]


def test_a_checkpoint_that_another_process_is_replacing_is_not_rotated_away(strategy, model, tmp_path):
    strategy.save_ckpt(model, tmp_path, tag="a")
    with holding(tmp_path, "a"):
        strategy.save_ckpt(model, tmp_path, tag="b", max_num=1)
    assert names(tmp_path) == ["a", "b", "latest"]


def test_a_killed_process_holds_no_lock(strategy, model, tmp_path):
    code = f"""
from pathlib import Path
from lightrft.strategy.checkpoint.save_checkpoint import TagWriter
TagWriter(Path({str(tmp_path)!r}), "t").begin("token", {{}})
import os
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert names(tmp_path) == [".t.lightrft-lock", ".t.writing"]
    strategy.save_ckpt(model, tmp_path, tag="t")
    assert names(tmp_path) == ["latest", "t"]


def test_one_process_at_a_time_holds_a_lock_and_its_file_is_removed(tmp_path):
    one, other = Lock(tmp_path, "t"), Lock(tmp_path, "t")
    assert one.acquire() and not other.acquire()
    one.release()
    assert other.acquire() and not one.acquire()
    other.release()
    assert not names(tmp_path)


def test_a_lock_file_that_was_removed_meanwhile_is_created_again(tmp_path, monkeypatch):
    one, other = Lock(tmp_path, "t"), Lock(tmp_path, "t")
    assert one.acquire()
    opened = os.open

    def slow(*arguments):
        descriptor = opened(*arguments)
        one.release()
        return descriptor

    monkeypatch.setattr(os, "open", slow)
    assert other.acquire(timeout=1)
    assert other.path.exists()
    other.release()


def test_a_file_system_without_locks_can_be_written_to(strategy, model, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    strategy.save_ckpt(model, tmp_path, tag="t")
    assert names(tmp_path) == ["latest", "t"]


# Other runs and other models


def test_rotation_leaves_other_runs_alone(tmp_path):
    for run in ("one", "two"):
        with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
            model = strategy.prepare_model(nn.Linear(3, 2))
            for step in range(3):
                strategy.save_ckpt(model, tmp_path, tag=f"{run}{step}", max_num=2)
    assert names(tmp_path) == ["latest", "one1", "one2", "two1", "two2"]


def test_checkpoints_of_other_runs_of_these_models_are_named_once(tmp_path, caplog):
    for run in ("one", "two"):
        with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
            model, critic = (strategy.prepare_model(nn.Linear(3, 2)) for _ in range(2))
            for step in range(2):
                strategy.save_ckpt(model, tmp_path, tag=f"{run}{step}", max_num=1)
                strategy.save_ckpt({"critic": critic}, tmp_path, tag=f"{run}-critic{step}", max_num=1)
            said = [record.getMessage() for record in caplog.records]
            if run == "one":
                assert not said
    assert len(said) == 1
    assert "has 1 checkpoints of these models from other runs (one1), which max_num" in said[0]


def test_a_resumed_run_does_not_warn_of_its_own_checkpoints(tmp_path, caplog):
    for run in ("one", "two"):
        with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
            model = strategy.prepare_model(nn.Linear(3, 2))
            if run == "two":
                strategy.load_ckpt(model, tmp_path)
            strategy.save_ckpt(model, tmp_path, tag=run)
    assert not caplog.records


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_tags_to_keep_are_neither_removed_nor_counted(strategy, model, tmp_path, kind):
    strategy.save_ckpt(model, tmp_path, tag="best")
    for step in range(4):
        strategy.save_ckpt(model, tmp_path, tag=f"s{step}", max_num=2, keep=kind(["best"]))
    assert names(tmp_path) == ["best", "latest", "s2", "s3"]
    strategy.save_ckpt(model, tmp_path, tag="s4", max_num=1, keep=kind(["s3"]))
    assert names(tmp_path) == ["latest", "s3", "s4"]


def test_a_tag_to_keep_that_is_not_there_is_named(strategy, model, tmp_path, caplog):
    strategy.save_ckpt(model, tmp_path, tag="best")
    strategy.save_ckpt(model, tmp_path, tag="s", keep=["bets"])
    assert "got 'bets', which is not there (there are best, s)" in caplog.text


@pytest.mark.parametrize(
    ("keep", "kind", "message"),
    [
        ("best", TypeError, r"save_ckpt: expected keep to be a list of tags, got str \('best'\)"),
        (3, TypeError, r"expected keep to be a list of tags, got int \(3\)"),
        ([1], TypeError, r"expected a tag in keep to be a string, got int \(1\)"),
        (["a/b"], ValueError, r"expected a tag in keep to be a directory name, got 'a/b'"),
    ],
)
def test_keep_is_a_list_of_tags(strategy, model, tmp_path, keep, kind, message):
    with pytest.raises(LightRFTError, match=message) as caught:
        strategy.save_ckpt(model, tmp_path, keep=keep)
    assert isinstance(caught.value, kind)
    assert not names(tmp_path)


def test_rotation_includes_the_checkpoints_of_a_resumed_run(tmp_path):
    for run in ("one", "two"):
        with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
            model = strategy.prepare_model(nn.Linear(3, 2))
            if run == "two":
                strategy.load_ckpt(model, tmp_path)
            for step in range(2):
                strategy.save_ckpt(model, tmp_path, tag=f"{run}{step}", max_num=2)
    assert names(tmp_path) == ["latest", "two0", "two1"]


def test_loading_weights_alone_does_not_resume_a_run(tmp_path):
    for tag in ("one", "two"):
        with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
            model = strategy.prepare_model(nn.Linear(3, 2))
            if tag == "two":
                strategy.load_ckpt(model, tmp_path, load_module_only=True)
            strategy.save_ckpt(model, tmp_path, tag=tag, max_num=1)
    assert names(tmp_path) == ["latest", "one", "two"]


def test_rotation_leaves_other_models_alone(strategy, model, tmp_path):
    critic = strategy.prepare_model(nn.Linear(3, 2))
    for step in range(2):
        strategy.save_ckpt(model, tmp_path, tag=f"actor{step}", max_num=1)
        strategy.save_ckpt(critic, tmp_path, tag=f"critic{step}", max_num=1)
        strategy.save_ckpt({"a": model, "c": critic}, tmp_path, tag=f"both{step}", max_num=1)
    assert names(tmp_path) == ["actor1", "both1", "critic1", "latest"]


def test_a_checkpoint_of_other_models_is_not_replaced(strategy, model, tmp_path):
    strategy.save_ckpt({"actor": model}, tmp_path, tag="t")
    with FakeStrategy(bf16=False, train_batch_size=1) as other:
        for name, module in (("critic", nn.Linear(3, 2)), ("actor", nn.Bilinear(3, 2, 1))):
            critic = other.prepare_model(module)
            with pytest.raises(
                CheckpointError, match=r"/t to be new.*other models: 'actor' \(Linear\) instead of .*Use another"
            ):
                other.save_ckpt({name: critic}, tmp_path, tag="t")
        other.save_ckpt({"actor": other.prepare_model(nn.Linear(3, 2))}, tmp_path, tag="t")


# When the disk, or the host, gives up


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (28, "free space there"),
        (13, "grant this user permission"),
        (17, "remove it, or use another tag"),
        (5, "check the file system"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_remedy(tmp_path, number, remedy):
    with (
        pytest.raises(CheckpointError, match=rf"cannot write {tmp_path}/t/file: .*; {remedy}"),
        files.explain_os_errors(tmp_path, "cannot write"),
    ):
        raise OSError(number, os.strerror(number), str(tmp_path / "t" / "file"))


def test_a_missing_file_is_named_with_its_tag_and_the_remedy(strategy, model, tmp_path):
    path = strategy.save_ckpt(model, tmp_path, tag="t")
    (path / "rank-00000-of-00001.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"t/rank-00000-of-00001.safetensors is damaged: .*from 't'; load another tag"
    ):
        strategy.load_ckpt(model, tmp_path)


@pytest.mark.parametrize(("module", "step"), [(files, "write_text"), (format, "write_tensors"), (files, "synchronise")])
def test_a_failed_save_leaves_no_files(strategy, model, tmp_path, monkeypatch, module, step):
    strategy.save_ckpt(model, tmp_path, tag="a")
    done = getattr(module, step)

    def full(path, *rest):
        if path.name.startswith(".b") or path.parent.name.startswith(".b"):
            raise CheckpointError(f"cannot write {path}: No space left on device")
        return done(path, *rest)

    monkeypatch.setattr(module, step, full)
    with pytest.raises(CheckpointError, match="No space left"):
        strategy.save_ckpt(model, tmp_path, tag="b")
    assert names(tmp_path) == ["a", "latest"]


def test_a_new_directory_and_all_in_it_are_on_disk(strategy, model, tmp_path, monkeypatch):
    synchronised = []
    synchronise = files.synchronise
    monkeypatch.setattr(files, "synchronise", lambda path: (synchronised.append(path), synchronise(path)))
    strategy.save_ckpt(model, tmp_path / "new" / "store", tag="t")
    assert {tmp_path, tmp_path / "new", tmp_path / "new" / "store"} <= set(synchronised)


def test_a_path_with_a_tilde_is_in_the_home_directory(strategy, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert strategy.save_ckpt(model, "~/store", tag="t") == tmp_path / "store" / "t"
    assert strategy.load_ckpt(model, "~/store")[0] == tmp_path / "store" / "t"
