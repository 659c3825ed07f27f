"""EXPORT: saving models for other tools."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, same
from lightrft.conformance.contract.bounded_memory import BoundedMemory
from lightrft.conformance.contract.program_parts import SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_STATE, READ_WEIGHTS
from lightrft.conformance.interpreter.exporting import WORDS

DISCARD: Operation = {"do": "discard_exports"}


@CONTRACT.add
class OpensInTransformers(Clause):
    """save_model writes a Hugging Face directory (safetensors, configuration, tokenizer).
    AutoModelForCausalLM.from_pretrained opens it and computes the same logits. Tied weights stay tied. If there are
    several files of weights, the index names the file of each tensor."""

    id = "EXPORT-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 1, "5GB", 2), self._program(target, 2, "3KB", 1, bucket=64)]

    def _program(self, target: Target, seed: int, shard: str, count: int, bucket: int = 1 << 20) -> Program:
        """Export a model, train it, and export it again to the same directory."""
        save: Operation = {"do": "save_export", "model": "a", "shard": shard}
        return program(
            target,
            DISCARD,
            *trained(kind="llama", seed=seed, lr=0.05),
            save,
            *updates(count),
            READ_WEIGHTS,
            {**save, "do": "export", "batch": seed},
            DISCARD,
            weight_sync_bucket_bytes=bucket,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        sizes, buckets = st.sampled_from(["1KB", "3KB", "5GB"]), st.sampled_from([1, 500, 1 << 20])
        return st.builds(
            lambda seed, shard, count, bucket: self._program(target, seed, shard, count, bucket),
            SEEDS,
            sizes,
            st.integers(0, 2),
            buckets,
        )

    @override
    def check(self, execution: Execution) -> None:
        weights = execution.last("weights")
        sharded = execution.program.operations[-2]["shard"] != "5GB"
        for rank, exported in enumerate(execution.last("export")):
            where = f"rank {rank}"
            worst = (exported["logits"] - exported["expected_logits"]).abs().max().item()
            self.require(
                worst <= 1e-5, f"{where}: the logits of the opened model differ by {worst:.3g}, expected at most 1e-5"
            )
            self.require(exported["tied"], f"{where}: the embeddings are no longer tied")
            if sharded:
                self.require_same(exported["tensors"], exported["index"], f"{where}: the index of the files")
            self.require(exported["vocabulary"] == WORDS, f"{where}: the tokenizer has another vocabulary")
            self.require(
                exported["class"] == ["LlamaForCausalLM"],
                f"{where}: expected the class LlamaForCausalLM, got {exported['class']}",
            )
            self.require(
                (len(exported["files"]) > 1) == sharded,
                f"{where}: expected {'several files' if sharded else 'one file'}, got {', '.join(exported['files'])}",
            )
            self.require(
                exported["weights"].keys() == weights[rank].keys()
                and all(same(exported["weights"][name], tensor) for name, tensor in weights[rank].items()),
                f"{where}: the saved weights differ from the model's",
            )
        self.require_same_on_all_ranks(execution, "export")


@CONTRACT.add
class Reloaded(Clause):
    """load_model reads what save_model wrote into the weights and persistent buffers of a prepared model, and training
    continues from them. Nothing else changes: optimizer state, learning rates, schedule and random states are kept."""

    id = "EXPORT-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        setup = trained(kind="running statistics", seed=3, schedule=True, lr=1e-2)
        random: Operation = {"do": "random_state"}
        rest: Operation = {"do": "set_rate", "model": "a", "lr": 0.0}
        return [
            program(
                target, DISCARD, *setup, *updates(1, scheduled=True), READ_STATE, {"do": "save_weights", "model": "a"},
                *updates(2, first=5, scheduled=True), READ_STATE, random, {"do": "load_weights", "model": "a"}, random, READ_STATE,
                rest, *updates(1, first=9), READ_WEIGHTS, DISCARD,
            )
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        saved, before, after = (seen for _, _, seen in execution.each("state"))
        random, random_after = (seen for _, _, seen in execution.each("random_state"))
        written = {part: saved[0][part] for part in ("parameters", "buffers")}  # the buffers of rank 0
        for rank, weights in enumerate(execution.last("weights")):
            for part, wanted in {**before[rank], **written}.items():
                self.require_same(wanted, after[rank][part], f"rank {rank}: {part} after load_model")
            self.require_same(random[rank], random_after[rank], f"rank {rank}: load_model changed")
            kept = {name: saved[0]["parameters"][name] for name in weights}
            self.require_same(kept, weights, f"rank {rank}: after one more update, with the learning rate 0")


@CONTRACT.add
class ExportMemory(BoundedMemory):
    """Exporting adds at most 2 x max(weight_sync_bucket_bytes, largest tensor) to the memory of each rank."""

    id = "EXPORT-2"
    smallest_world = 2
    measured = "measured_export"
    before = (DISCARD,)
    after = (DISCARD,)
