"""GEN: prompts with images and videos, as far as a strategy handles them."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, show

ECHO: Operation = {"do": "engine", "kind": "lightrft.conformance.echo:EchoEngine"}
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
Counts = tuple[int, int]


def request(counts: Sequence[Counts], nested: bool, tokens: bool = False) -> dict[str, Any]:
    """Arguments of gather_and_generate for prompts with so many images and videos each."""
    images = [[f"image {index}.{number}" for number in range(it[0])] for index, it in enumerate(counts)]
    videos = [[f"video {index}.{number}" for number in range(it[1])] for index, it in enumerate(counts)]
    arguments: dict[str, Any] = {
        "sampling_params": {"max_tokens": 1},
        "all_prompts": [f"question {index}: {IMAGE * 2} and {VIDEO} <|other|>" for index in range(len(counts))],
        "all_images": images if nested else [it for own in images for it in own],
        "all_videos": videos if nested else [it for own in videos for it in own],
        "images_num": [it[0] for it in counts],
        "videos_num": [it[1] for it in counts],
    }
    return (
        {**arguments, "all_prompt_token_ids": [[index + 1, 2] for index in range(len(counts))]} if tokens else arguments
    )


def echoes(counts: Sequence[Counts], tokens: bool = False) -> list[Any]:
    """What the engine must have been asked."""
    said = []
    for index, (images, videos) in enumerate(counts):
        text = f"question {index}: {IMAGE * 2 if images else ''} and {VIDEO if videos else ''} <|other|>"
        own = (
            [f"image {index}.{number}" for number in range(images)],
            [f"video {index}.{number}" for number in range(videos)],
        )
        said.append([{"text": text, "images": own[0], "videos": own[1]}, [index + 1, 2] if tokens else []])
    return said


def heard(completions: Sequence[Any]) -> list[Any]:
    """What the engine was asked."""
    return [[json.loads(it["text"]), it["prompt"]] for it in completions]


@CONTRACT.add
class Media(Clause):
    """Images and videos may be nested per prompt or flat with counts; a prompt without any loses its vision placeholders
    and nothing else. Token ids may accompany prompts with images or videos, as the unexpanded prompt."""

    id = "GEN-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        counts = [(2, 0), (0, 1), (0, 0), (1, 2)]
        return [self._program(counts, nested, tokens) for nested in (True, False) for tokens in (True, False)]

    def _program(self, counts: Sequence[Counts], nested: bool, tokens: bool) -> Program:
        return Program(
            operations=(
                ECHO,
                {"do": "generate_raw", **request(counts, nested, tokens), "counts": list(counts), "tokens": tokens},
            )
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        counts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4)
        return st.builds(self._program, counts, st.booleans(), st.booleans())

    @override
    def check(self, trial: Trial) -> None:
        operation = trial.program.operations[1]
        wanted = echoes(operation["counts"], operation["tokens"])
        for rank, seen in enumerate(trial.last("generate_raw")):
            self.require(
                heard(seen) == wanted,
                f"rank {rank}: the engine was asked {show(heard(seen), 400)}, wanted {show(wanted, 400)}",
            )


@CONTRACT.add
class MediaCounts(Clause):
    """Counts of images or videos that do not add up raise, on every rank."""

    id = "GEN-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        right = request([(1, 0), (2, 1)], nested=False)
        wrong: list[dict[str, Any]] = [
            {"images_num": [1, 1]}, {"images_num": [1, 2, 3]}, {"videos_num": [1, 1]}, {"all_images": None},
            {"all_images": ["one"], "images_num": None}, {"all_prompts": None}, {"all_prompt_token_ids": [[1]]},
        ]  # fmt: skip
        bad = [{"do": "generate_raw", **right, **it, "may_fail": True} for it in wrong]
        return [Program(operations=(ECHO, *bad, {"do": "generate_raw", **right}))]

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("generate_raw"):
            for rank, observed in enumerate(seen):
                if operation.get("may_fail"):
                    self.require_error(observed, "ValueError", where=f"rank {rank}, operation {index}")
                else:
                    self.require(not is_error(observed), f"rank {rank}: afterwards {show(observed)}")


@CONTRACT.add
class MixedRanks(Clause):
    """Ranks with text only and ranks with images can generate in the same call."""

    id = "GEN-5"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        text = {"sampling_params": {"max_tokens": 1}, "all_prompt_token_ids": [[7, 8]]}
        return [
            Program(
                operations=(ECHO, {"do": "generate_raw", "by_rank": [text, request([(1, 0), (0, 0)], nested=True)]})
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        for rank, seen in enumerate(trial.last("generate_raw")):
            wanted = echoes([(1, 0), (0, 0)]) if rank % 2 else [[{"text": None, "images": [], "videos": []}, [7, 8]]]
            self.require(
                heard(seen) == wanted,
                f"rank {rank}: the engine was asked {show(heard(seen), 400)}, wanted {show(wanted, 400)}",
            )
