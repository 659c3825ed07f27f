"""What a strategy leaves behind: in the process, on models, and of the caller's process group."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target
from lightrft.conformance.contract.program_parts import SUM, program, trained, updates


@CONTRACT.add
class Lifetimes(Clause):
    """close() is idempotent, and so is leaving a with block, even by an exception. Both release everything that the
    strategy created: process groups and their threads, child processes and environment variables, also after saving and
    loading. A second strategy in the same process works, and leaves no more threads, files or variables than the
    first."""

    id = "LIFE-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        files: list[Operation] = [{"do": "save", "model": "a", "tag": "t"}, {"do": "load", "model": "a", "tag": "t"}]
        engine: Operation = {"do": "engine", "kind": target.engine, "actor": "a"}
        once = [*trained(kind=target.language_model), *updates(1), *files, engine, files[0], SUM]
        again: list[Operation] = []
        for remember in ("first", "second", "third"):
            again += [
                *once,
                {"do": "close"},
                {"do": "close"},
                {"do": "resources", "remember": remember, "compare": "nothing"},
                {"do": "restart"},
            ]
        looks: list[Operation] = [*once, {"do": "close"}, {"do": "resources", "compare": "second"}]
        begin: list[Operation] = [{"do": "empty_disk"}, {"do": "resources", "remember": "nothing"}]
        end: Operation = {"do": "empty_disk", "keep": False}
        left: Operation = {"do": "resources", "compare": "nothing"}
        return [
            *(
                program(target, *begin, *again, *looks, end, seconds=240, async_ckpt=asynchronous)
                for asynchronous in (False, True)
            ),
            Program(operations=(*begin, SUM, {"do": "leave_context"}, left)),
            program(target, *begin, *once, {"do": "leave_context", "raising": True}, end),
        ]

    @override
    def check(self, execution: Execution) -> None:
        for _, operation, seen in execution.each("resources"):
            if "compare" not in operation:
                continue
            for rank, grown in enumerate(seen):
                self.require(not grown["initialized"], f"rank {rank}: close left a process group")
                self.require(not grown["environment"], f"rank {rank}: close left the variables {grown['environment']}")
                self.require(grown["children"] <= 0, f"rank {rank}: close left {grown['children']} child processes")
                if (
                    "remember" not in operation and operation["compare"] == "nothing"
                ):  # no model is kept, which may hold a group
                    self.require(
                        grown["group threads"] <= 0,
                        f"rank {rank}: close left {grown['group threads']} threads of process groups",
                    )
                if operation["compare"] == "second":
                    self.require(
                        grown["threads"] <= 0, f"rank {rank}: each strategy leaves {grown['threads']} more threads"
                    )
                    self.require(
                        grown["files"] <= 0, f"rank {rank}: each strategy leaves {grown['files']} more open files"
                    )
        for _, _, seen in execution.each("leave_context"):
            self.require(all(seen), "leaving the with block left a process group or an engine")


@CONTRACT.add
class CleanModels(Clause):
    """What a strategy attaches to the caller's models does not grow from update to update. close() removes its hooks
    and methods from every model whose parameters it does not shard."""

    id = "LIFE-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        look: list[Operation] = [{"do": "attachments", "model": model} for model in "ab"]
        uses: list[Operation] = [
            {"do": "weights", "model": "a"},
            {"do": "forward", "model": "b", "batch": 3},
            {"do": "offload_model", "model": "b"},
            {"do": "reload_model", "model": "b"},
        ]
        setup: list[Operation] = [
            {"do": "build", "model": "b", "seed": 2},
            {"do": "prepare_inference", "model": "b"},
        ]
        build, *rest = trained(kind="running statistics")
        return [
            program(
                target, setup[0], build, *look, *setup[1:], *rest, *updates(1), *uses, *look, *updates(3), *uses, *uses,
                *look, {"do": "close"}, *look,
            )
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        looks = [seen for _, _, seen in execution.each("attachments")]
        for rank in range(execution.target.world):
            for model in (0, 1):
                built, once, often, closed = [seen[rank] for seen in looks[model::2]]
                where = f"rank {rank}, model {'ab'[model]}"
                more = sorted(set(often["attached"]) - set(once["attached"]))
                self.require(not more, f"{where}: three more updates attached {', '.join(more)}")
                left = sorted(set(closed["attached"]) - set(built["attached"]))
                sharded = closed["parameters"] != built["parameters"]
                self.require(sharded or not left, f"{where}: close left {', '.join(left)}")


@CONTRACT.add
class CallersProcessGroup(Clause):
    """A strategy reuses the caller's process group and never destroys it."""

    id = "LIFE-8"
    grouped_only = True

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(
                target,
                {"do": "make_process_group"},
                {"do": "world"},
                *trained(),
                *updates(1),
                SUM,
                {"do": "close"},
                {"do": "group_alive"},
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for rank, alive in enumerate(execution.last("group_alive")):
            self.require(alive is True, f"rank {rank}: close destroyed the process group of the script")
