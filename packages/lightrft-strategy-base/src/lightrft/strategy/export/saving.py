"""From a prepared model to a directory that Hugging Face tools open.

The weights come as a stream: every rank takes part in gathering a bucket, rank 0 writes it to its place in files that
were laid out before, and it is gone when the next one comes.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from lightrft.config import CheckpointError
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint import files
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.export import companions
from lightrft.strategy.export.parts import parts_of
from lightrft.strategy.export.plan import Options, Plan
from lightrft.strategy.export.publication import Publication
from lightrft.strategy.export.tensor_files import TensorWriter
from lightrft.strategy.rollout import weights
from lightrft.strategy.training.prepared import PreparedModel

CALL = "save_model"


class Output:
    """The directory being written, on rank 0."""

    def __init__(self, target: Path, plans: Iterable[Plan], options: Options) -> None:
        self._stack = ExitStack()
        self._publication = Publication(target)
        self._stack.callback(self._publication.discard)
        self._writers: list[TensorWriter] = []
        try:
            self._publication.check_space(sum(plan.nbytes for plan in plans))
            with files.naming(self._publication.folder, "cannot write"):
                for plan in plans:
                    self._writers.append(self._begin(plan))
                companions.write_processors(options.processors, self._publication.folder)
        except BaseException:
            self._stack.close()
            raise

    def _begin(self, plan: Plan) -> TensorWriter:
        folder = self._publication.folder / plan.part.folder
        folder.mkdir(exist_ok=True)
        plan.part.write_configuration(folder, plan.contents)
        return self._stack.enter_context(TensorWriter(folder, plan.layouts()))

    def write(self, part: int, bucket: weights.Bucket) -> None:
        """Write a bucket of one part."""
        for name, tensor in bucket:
            self._writers[part].write(name, tensor)

    def publish(self) -> None:
        """Make the directory appear."""
        for writer in self._writers:
            writer.finish()
        self._publication.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def save(backend: Backend, collectives: Collectives, model: PreparedModel, target: Path, options: Options) -> None:
    """Write ``model`` to ``target``. Every rank calls this, and all raise where one cannot go on."""
    with ExitStack() as stack:
        output: Output | None = None
        with collectives.together(CALL, CheckpointError):
            backend._settle(model.module)
            parts = parts_of(
                model.module, model.skeleton or model.module, model.kind, merge_adapters=options.merge_adapters
            )
            plans = [Plan(backend, model.module, part, options) for part in parts]
            if backend.world.rank == 0:
                output = stack.enter_context(Output(target, plans, options))
        with collectives.together(CALL, CheckpointError):
            _write(plans, output)
            if output is not None:
                output.publish()


def _write(plans: Iterable[Plan], output: Output | None) -> None:
    stream = ((part, bucket) for part, plan in enumerate(plans) for bucket in plan.stream())
    try:
        for part, bucket in stream:
            if output is not None:
                output.write(part, bucket)
            bucket.clear()
    finally:
        for _ in stream:  # after a failure here the other ranks are still gathering with this one
            pass
