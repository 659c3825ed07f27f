"""EXPORT: models that leave for other tools."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, same
from lightrft.conformance.contract.drawing import FP32, SEEDS, geometry, trained, updates
from lightrft.conformance.contract.near import LOOK
from lightrft.conformance.interpreter.exporting import VOCABULARY

DISCARD: Operation = {"do": "discard_exports"}


@CONTRACT.add
class OpensElsewhere(Clause):
    """save_model writes a Hugging Face directory (safetensors, configuration, tokenizer) that
    AutoModelForCausalLM.from_pretrained opens, with equal logits; tied weights stay tied."""

    id = "EXPORT-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 1, "5GB", 2), self._program(place, 2, "3KB", 1, bucket=64)]

    def _program(self, place: Place, seed: int, shard: str, count: int, bucket: int = 1 << 20) -> Program:
        """A model that is exported, trained, and exported again to the same place."""
        export: Operation = {"do": "export", "model": "a", "batch": seed, "shard": shard}
        operations = (
            DISCARD,
            *trained(kind="llama", seed=seed, lr=0.05),
            export,
            *updates(count),
            LOOK,
            export,
            DISCARD,
        )
        return Program(operations=operations, settings={**FP32, "weight_sync_bucket_bytes": bucket, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        sizes, buckets = st.sampled_from(["1KB", "3KB", "5GB"]), st.sampled_from([1, 500, 1 << 20])
        return st.builds(
            lambda seed, shard, count, bucket: self._program(place, seed, shard, count, bucket),
            SEEDS,
            sizes,
            st.integers(0, 2),
            buckets,
        )

    @override
    def check(self, trial: Trial) -> None:
        weights = trial.last("weights")
        sharded = trial.program.operations[-2]["shard"] != "5GB"
        for rank, found in enumerate(trial.last("export")):
            where = f"rank {rank}"
            worst = (found["logits"] - found["own"]).abs().max().item()
            self.require(worst <= 1e-5, f"{where}: what transformers opens differs by {worst:.3g} in its logits")
            self.require(found["tied"], f"{where}: the embeddings, which were tied, are not")
            self.require(found["vocabulary"] == VOCABULARY, f"{where}: the tokenizer has lost its words")
            self.require(found["class"] == ["LlamaForCausalLM"], f"{where}: its class is said to be {found['class']}")
            self.require((len(found["files"]) > 1) == sharded, f"{where}: the files are {', '.join(found['files'])}")
            self.require(
                found["weights"].keys() == weights[rank].keys()
                and all(same(found["weights"][name], it) for name, it in weights[rank].items()),
                f"{where}: what was written are not the model's weights",
            )
        self.require_alike(trial, "export")


@CONTRACT.add
class ExportMemory(Clause):
    """While exporting, no rank holds more than what it holds at rest plus 2 x max(bucket, largest tensor)."""

    id = "EXPORT-2"
    smallest_world = 2
    bucket = 16 << 20
    slack = 12 << 20
    """What an allocator, a process group and Python may keep for themselves."""

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = (DISCARD, *trained(kind="deep"), {"do": "measured_export", "model": "a"}, DISCARD)
        settings = {**FP32, "weight_sync_bucket_bytes": self.bucket, **geometry(place)}
        return [Program(operations=operations, settings=settings)]

    @override
    def check(self, trial: Trial) -> None:
        bound = 2 * self.bucket + self.slack
        for rank, taken in enumerate(trial.last("measured_export")):
            self.require(
                taken <= bound,
                f"rank {rank}: exporting took {taken / 2**20:.0f} MiB, more than {bound / 2**20:.0f}; a bucket has "
                f"{self.bucket / 2**20:.0f}, the model {8 * self.bucket / 2**20:.0f}",
            )
