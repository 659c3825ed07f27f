"""The updates of epochs that are no multiple of train_batch_size do not depend on the number of ranks."""

from pathlib import Path

import epochs
from workers import Workers


def test_two_ranks_make_the_updates_of_plain_torch(two: Workers, tmp_path: Path) -> None:
    for seen in two.run(epochs.losses, strategy="deepspeed", zero_stage=2, path=tmp_path):
        epochs.require_plain(seen)


def test_an_epoch_of_one_process_goes_on_with_two_ranks(two: Workers, tmp_path: Path) -> None:
    epochs.losses("fake", tmp_path, micro=12, save_after=4)
    for seen in two.run(epochs.losses, strategy="deepspeed", zero_stage=2, path=tmp_path, resume=True):
        epochs.require_plain(seen, skipped=4)
