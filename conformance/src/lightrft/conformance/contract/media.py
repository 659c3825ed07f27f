"""GEN: how a strategy handles prompts with images and videos."""

import json
from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target, is_error, show

ECHO: Operation = {"do": "engine", "kind": "lightrft.conformance.echo:EchoEngine"}
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
Counts = tuple[int, int]


def request(counts: Sequence[Counts], nested: bool, tokens: bool = False) -> Record:
    """Arguments of gather_and_generate for prompts with these numbers of images and videos."""
    images = [[f"image {index}.{number}" for number in range(count[0])] for index, count in enumerate(counts)]
    videos = [[f"video {index}.{number}" for number in range(count[1])] for index, count in enumerate(counts)]
    arguments: Record = {
        "sampling_params": {"max_tokens": 1},
        "all_prompts": [f"question {index}: {IMAGE * 2} and {VIDEO} <|other|>" for index in range(len(counts))],
        "all_images": images if nested else [image for prompt in images for image in prompt],
        "all_videos": videos if nested else [video for prompt in videos for video in prompt],
        "images_num": [count[0] for count in counts],
        "videos_num": [count[1] for count in counts],
    }
    return (
        {**arguments, "all_prompt_token_ids": [[index + 1, 2] for index in range(len(counts))]} if tokens else arguments
    )


def requests(counts: Sequence[Counts], tokens: bool = False) -> list[list[object]]:
    """The requests that the engine must receive."""
    expected: list[list[object]] = []
    for index, (images, videos) in enumerate(counts):
        text = f"question {index}: {IMAGE * 2 if images else ''} and {VIDEO if videos else ''} <|other|>"
        media = (
            [f"image {index}.{number}" for number in range(images)],
            [f"video {index}.{number}" for number in range(videos)],
        )
        expected.append([{"text": text, "images": media[0], "videos": media[1]}, [index + 1, 2] if tokens else []])
    return expected


def received(completions: Sequence[Record]) -> list[list[object]]:
    """The requests that the engine received."""
    return [[json.loads(completion["text"]), completion["prompt"]] for completion in completions]


@CONTRACT.add
class Media(Clause):
    """Images and videos are nested per prompt, or flat with counts. A prompt without media loses its vision
    placeholders and nothing else. Token ids may accompany prompts with images or videos, as the unexpanded prompt."""

    id = "GEN-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
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
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        counts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4)
        return st.builds(self._program, counts, st.booleans(), st.booleans())

    @override
    def check(self, execution: Execution) -> None:
        operation = execution.program.operations[1]
        expected = requests(operation["counts"], operation["tokens"])
        for rank, seen in enumerate(execution.last("generate_raw")):
            self.require(
                received(seen) == expected,
                f"rank {rank}: expected the request {show(expected, 400)}, got {show(received(seen), 400)}",
            )


@CONTRACT.add
class MediaCounts(Clause):
    """Counts of images or videos that do not match the media raise on every rank."""

    id = "GEN-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        right = request([(1, 0), (2, 1)], nested=False)
        wrong: list[Record] = [
            {"images_num": [1, 1]}, {"images_num": [1, 2, 3]}, {"videos_num": [1, 1]}, {"all_images": None},
            {"all_images": ["one"], "images_num": None}, {"all_prompts": None}, {"all_prompt_token_ids": [[1]]},
        ]  # fmt: skip
        bad = [{"do": "generate_raw", **right, **arguments, "may_fail": True} for arguments in wrong]
        return [Program(operations=(ECHO, *bad, {"do": "generate_raw", **right}))]

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("generate_raw"):
            for rank, observed in enumerate(seen):
                if operation.get("may_fail"):
                    self.require_error(observed, "ValueError", where=f"rank {rank}, operation {index}")
                else:
                    self.require(
                        not is_error(observed), f"rank {rank}: afterwards, expected completions, got {show(observed)}"
                    )


@CONTRACT.add
class MixedRanks(Clause):
    """Ranks with text only and ranks with images can generate in the same call."""

    id = "GEN-5"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        text = {"sampling_params": {"max_tokens": 1}, "all_prompt_token_ids": [[7, 8]]}
        return [
            Program(
                operations=(ECHO, {"do": "generate_raw", "by_rank": [text, request([(1, 0), (0, 0)], nested=True)]})
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for rank, seen in enumerate(execution.last("generate_raw")):
            expected = (
                requests([(1, 0), (0, 0)]) if rank % 2 else [[{"text": None, "images": [], "videos": []}, [7, 8]]]
            )
            self.require(
                received(seen) == expected,
                f"rank {rank}: expected the request {show(expected, 400)}, got {show(received(seen), 400)}",
            )
