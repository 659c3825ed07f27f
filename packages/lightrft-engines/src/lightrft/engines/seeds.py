"""Seeds of requests, for engines that draw each from a seed of its own."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from lightrft.engines.media import frames, picture
from lightrft.strategy import Prompt, Sampling
from lightrft.strategy.rollout.sampling import stream_key


def seed_of(prompt: Prompt, sampling: Sampling, sample: int = 0) -> int | None:
    """The seed of one completion, below 2**62: it follows from the seed asked for, the prompt and ``sample`` alone.

    Were it the same for all prompts, their draws would follow each other. None where none was asked for.
    """
    if sampling.seed is None or sampling.greedy:
        return None
    text = prompt.token_ids if prompt.token_ids is not None else (prompt.text or "").encode()
    media = b"".join(_digests(prompt))
    return int.from_bytes(stream_key(sampling.seed, [*text, *media], sample)[:8], "little") >> 2


def _digests(prompt: Prompt) -> Iterator[bytes]:
    """Of the pictures and videos whose numbers can be seen."""
    for media in (*map(picture, prompt.images), *map(frames, prompt.videos)):
        with suppress(TypeError, ValueError):  # on a GPU, or in a form that only the engine knows
            numbers: Any = np.asarray(media)
            if numbers.dtype != object:
                yield hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
