"""Seeds of single completions, for engines that seed each request."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from lightrft.engines.media import to_frames, to_rgb
from lightrft.strategy.engine import Prompt, Sampling, random_key


def completion_seed(prompt: Prompt, sampling: Sampling, sample: int = 0) -> int | None:
    """The seed of one completion, below 2**62. It depends only on ``sampling.seed``, the prompt and ``sample``.

    With one seed for all prompts their draws would be correlated.

    Returns: The seed; None if ``sampling`` has no seed or is greedy.
    """
    if sampling.seed is None or sampling.greedy:
        return None
    text = prompt.token_ids if prompt.token_ids is not None else (prompt.text or "").encode()
    media = b"".join(_digests(prompt))
    return int.from_bytes(random_key(sampling.seed, [*text, *media], sample)[:8], "little") >> 2


def _digests(prompt: Prompt) -> Iterator[bytes]:
    """Digests of the images, videos and audio whose values can be read."""
    sounds = (audio[0] if isinstance(audio, tuple) else audio for audio in prompt.audios)  # without the sampling rate
    for media in (*map(to_rgb, prompt.images), *map(to_frames, prompt.videos), *sounds):
        with suppress(TypeError, ValueError):  # a tensor on a GPU, or a form that only the engine knows
            values = np.asarray(media)
            if values.dtype != object:
                yield hashlib.blake2b(values.tobytes(), digest_size=16).digest()
