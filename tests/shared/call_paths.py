"""Which of our files a call passes through: ``python tests/shared/call_paths.py`` prints them, in the order of first entry.

On FakeStrategy with a small language model, each call after a first one that is not traced: what is imported or allocated
once does not count. A step is `backward` and `optimizer_step`, without the forward. Threads that the strategy starts are traced like the caller's.
"""

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from llamas import llama
from programs import tokens

import lightrft
from lightrft.strategy import get_fake_strategy

Call = Callable[[], object]
FOLDERS = tuple(str(Path(path)) for path in lightrft.__path__)


class Tracer:
    """Records our files that are entered while a call runs, in every thread started after `installed`."""

    def __init__(self) -> None:
        self._files: dict[str, None] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have Python report every call."""
        before = sys.getprofile(), threading.getprofile()
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before[0])
            threading.setprofile(before[1])

    def files_of(self, call: Call) -> list[str]:
        """The files that ``call`` enters, from `lightrft` on."""
        files: dict[str, None] = {}
        self._files = files
        try:
            call()
        finally:
            self._files = None
        return list(files)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if self._files is not None and event == "call":
            path = frame.f_code.co_filename
            for folder in FOLDERS:
                if path.startswith(folder):
                    self._files[path.removeprefix(folder).lstrip("/")] = None


def call_paths() -> dict[str, list[str]]:
    """The files of each call, in the order of first entry."""
    tracer = Tracer()
    with tracer.installed(), tempfile.TemporaryDirectory() as folder, _calls(Path(folder)) as calls:
        for prepare in calls.values():
            prepare()()
        return {name: tracer.files_of(prepare()) for name, prepare in calls.items()}


@contextmanager
def _calls(folder: Path) -> Iterator[dict[str, Callable[[], Call]]]:
    """Functions, by name, that prepare a call and return it."""
    with get_fake_strategy(bf16=False, train_batch_size=1, engine_type="fake") as strategy:
        model = llama()
        optimizer = strategy.create_optimizer(model, lr=1e-3)
        model, optimizer, _ = strategy.prepare((model, optimizer, None))
        strategy.setup_inference_engine({"pretrain": "none"}, "fake", actor=model)
        inputs_BT = tokens(0)

        def forward() -> Call:
            loss = model(input_ids=inputs_BT, labels=inputs_BT).loss

            def step() -> None:
                strategy.backward(loss, model, optimizer)
                strategy.optimizer_step(optimizer, model)

            return step

        yield {
            "step": forward,
            "save_ckpt": lambda: partial(strategy.save_ckpt, model, folder, tag="t"),
            "load_ckpt": lambda: partial(strategy.load_ckpt, model, folder),
            "update_engine_weights": lambda: partial(strategy.update_engine_weights, model),
            "gather_and_generate": lambda: partial(strategy.gather_and_generate, {"max_tokens": 2}, inputs_BT.tolist()),
        }


def main() -> None:
    """Print them."""
    for name, files in call_paths().items():
        print(f"{name}: {len(files)} files", *files, sep="\n  ")


if __name__ == "__main__":
    main()
