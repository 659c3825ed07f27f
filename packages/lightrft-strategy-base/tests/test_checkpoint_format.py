"""The files of a checkpoint: which rank writes what, headers, manifest, checksums, and memory."""

import itertools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_models import in_training, same, update, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightrft.config import (
    CheckpointError,
)
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader, fragments
from lightrft.strategy.checkpoint.format import Manifest, Piece, Stamp, decode_header, encode_header, header_length
from lightrft.strategy.checkpoint.plan import check_covered, choose_writers
from lightrft.strategy.tensors import memory_of


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


def test_a_dtype_that_files_cannot_store_is_named(strategy, tmp_path):
    model, _ = in_training(strategy)
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        CheckpointError, match=r"model/buffers/wave .*support \(float64, float32.*got torch.complex64. Cast it"
    ):
        strategy.save_ckpt(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_single_element_has_bytes_whatever_its_stride(dtype):
    single = torch.ones(10, dtype=dtype)[::5][:1]
    assert bytes(memory_of(single)) == bytes(memory_of(torch.ones(1, dtype=dtype)))


RANGES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 4)), max_size=8, unique=True),
    min_size=1, max_size=4,
)  # fmt: skip


@given(RANGES)
def test_each_range_is_written_by_one_of_its_holders(held):
    chosen = choose_writers(held)
    assert set(chosen) == {value for ranges in held for value in ranges}
    assert all(value in held[rank] for value, rank in chosen.items())


def test_replicas_share_the_writing():
    ranges = [(entry, 0, 10) for entry in range(8)]
    chosen = list(choose_writers([ranges, ranges, ranges, ranges]).values())
    assert [chosen.count(rank) for rank in range(4)] == [2, 2, 2, 2]


@given(st.integers(0, 20), st.lists(st.integers(0, 20), max_size=4), st.data())
def test_any_range_is_assembled_from_any_pieces(numel, cuts, data):
    bounds = sorted({0, numel, *(value for value in cuts if value < numel)})
    pieces = [
        (0, Piece(entry="e", dtype=torch.uint8, shape=(numel,), offset=begin, numel=end - begin))
        for begin, end in itertools.pairwise(bounds)
    ]
    offset = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - offset))
    taken = [
        piece.offset + start + index
        for _, piece, start, count in fragments({"e": pieces}, "e", offset, length)
        for index in range(count)
    ]
    assert taken == list(range(offset, offset + length))


def test_ranges_that_do_not_cover_a_tensor_are_refused():
    check_covered("e", 10, [(5, 5), (0, 5)])
    with pytest.raises(CheckpointError, match="hold all 10 elements of e, found no rank with those from 4 on"):
        check_covered("e", 10, [(5, 5), (0, 4)])


def test_a_header_describes_its_pieces():
    pieces = [
        Piece(entry=f"m/parameters/{name}", dtype=dtype, shape=(4, 2), offset=offset, numel=numel, checksum="0" * 8)
        for name, dtype, offset, numel in [("a", torch.float32, 0, 5), ("b@1", torch.bfloat16, 3, 5)]
    ]
    stamp = Stamp(tag="t", nonce="n")
    header = encode_header(pieces, stamp)
    assert header_length(header[:8], 10**6) == len(header)
    got, its = decode_header(header)
    assert its == stamp
    assert [(piece.entry, piece.dtype, piece.offset, piece.numel) for piece in got] == [
        (piece.entry, piece.dtype, piece.offset, piece.numel) for piece in pieces
    ]
    assert got[1].position - got[0].position == 20


def test_the_files_are_safetensors(strategy, tmp_path):
    from safetensors.torch import load_file

    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path)
    stored = load_file(path / "rank-00000-of-00001.safetensors")
    assert torch.equal(stored["model/parameters/0.weight@0"], model[0].weight.detach().view(-1))


def test_pieces_of_full_cache_lines_are_aligned_to_lines_and_others_to_their_elements(strategy, tmp_path):
    model, optimizer = in_training(strategy, width=16)
    update(strategy, model, optimizer)
    with CheckpointReader(strategy.save_ckpt(model, tmp_path)) as got:
        pieces = [piece for _, piece in got.pieces]
    full_lines = [piece for piece in pieces if piece.nbytes % 64 == 0]
    assert full_lines and len(full_lines) < len(pieces)
    assert all(piece.position % 64 == 0 for piece in full_lines)
    assert all(piece.position % piece.dtype.itemsize == 0 for piece in pieces)


def test_a_checkpoint_is_read_without_a_strategy(strategy, tmp_path):
    model, _ = in_training(strategy)
    with CheckpointReader(strategy.save_ckpt(model, tmp_path)) as got:
        got.verify()
        assert got.models == ["model"]
        assert torch.equal(got.tensor("model/parameters/0.weight"), model[0].weight)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-of-00001.safetensors"])
def test_files_of_two_saves_cannot_be_mixed(strategy, tmp_path, name):
    model = strategy.prepare_model(nn.Linear(3, 2))
    one, other = (strategy.save_ckpt(model, tmp_path, tag=tag, client_state={"tag": tag}) for tag in ("one", "two"))
    rank_file = other / "rank-00000-of-00001.safetensors"
    assert rank_file.stat().st_size == (one / rank_file.name).stat().st_size
    shutil.copyfile(one / name, other / name)
    with pytest.raises(
        CheckpointError, match=rf"two/{rank_file.name} .* was written by another save \(tag '(one|two)'\)"
    ):
        strategy.load_ckpt(model, tmp_path, tag="two")


def test_every_changed_character_of_a_manifest_is_found(strategy, tmp_path):
    model, _ = in_training(strategy)
    text = (strategy.save_ckpt(model, tmp_path) / "manifest.json").read_text()
    assert Manifest.from_text(text).to_text() == text
    draw = random.Random(0)
    for position in draw.sample(range(len(text)), 50):
        with pytest.raises(CheckpointError):
            Manifest.from_text(text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :])


@pytest.mark.parametrize("lacking", ["models", "loaders", "client_state"])
def test_a_manifest_that_lacks_something_is_named(strategy, tmp_path, lacking):
    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path, tag="t") / "manifest.json"
    manifest = Manifest.from_text(path.read_text())
    del manifest.state[lacking]
    path.write_text(manifest.to_text())
    with pytest.raises(CheckpointError, match=f"t/manifest.json.*KeyError: '{lacking}'"):
        strategy.load_ckpt(model, tmp_path, tag="t")


def test_checksums_use_the_configured_algorithm_and_any_strategy_reads_them(strategy, tmp_path):
    with get_fake_strategy(bf16=False, train_batch_size=1, ckpt_checksum="sha256") as other:
        model, _ = in_training(other)
        path = other.save_ckpt(model, tmp_path, tag="t")
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.manifest.checksum == "sha256"
        assert {len(piece.checksum) for _, piece in checkpoint.pieces} == {64}
    here, _ = in_training(strategy)
    strategy.load_ckpt(here, tmp_path)
    assert same(weights(here), weights(model))
    file = next(path.glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        strategy.load_ckpt(here, tmp_path)


MEMORY = """
import sys, torch
from pathlib import Path
from torch import nn
from lightrft.strategy import get_fake_strategy


def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def extra(action):
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory("VmRSS")
    action()
    return (memory("VmHWM") - before) / size


with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    strategy.prepare((model, optimizer, None))
    strategy.backward(model(torch.ones(1, 1024)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    size = sum(it.nbytes for it in model.parameters())
    print(extra(lambda: strategy.save_ckpt(model, sys.argv[1])), extra(lambda: strategy.load_ckpt(model, sys.argv[1])))
    print(extra(lambda: strategy.save_model(model, None, sys.argv[1] + "/out")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_process_holds_a_second_copy_of_the_model(tmp_path):
    """Of 100 MB of weights, 300 with state: two chunks of 16 MB, and what Python needs, at most."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    got = [float(number) for number in done.stdout.split()]
    assert len(got) == 3 and max(got) < 0.5, got
