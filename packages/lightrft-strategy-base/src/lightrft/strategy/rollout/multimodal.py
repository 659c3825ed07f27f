"""From the lists that a trainer passes to one `Prompt` each: token ids, text, images, videos.

Media come nested, a list a prompt, or flat, one list and a count a prompt. A prompt that has none of a kind
loses the placeholders of that kind, and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from lightrft.config import ArgumentError
from lightrft.strategy.rollout.engine import Prompt

_IMAGE = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>")
_VIDEO = re.compile(r"<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>")


def build_prompts(
    token_ids: Sequence[Sequence[int]] | None,
    texts: Sequence[str] | None,
    images: Sequence[Any] | None,
    images_num: Sequence[int] | None,
    videos: Sequence[Any] | None,
    videos_num: Sequence[int] | None,
) -> list[Prompt]:
    """One `Prompt` each. Raises `ArgumentError` where the lists do not fit together."""
    if isinstance(texts, str):
        raise ArgumentError(f"generate: all_prompts is one text, {texts[:40]!r}; wanted a list of them")
    if token_ids is None and texts is None:
        raise ArgumentError("generate: give all_prompt_token_ids, or all_prompts, or both; got neither")
    count = len(token_ids if token_ids is not None else texts or ())
    if token_ids is not None and texts is not None and len(texts) != count:
        raise ArgumentError(
            f"generate: {count} prompts as token ids and {len(texts)} as text; they must be the same prompts"
        )
    image_lists = media_by_prompt(images, images_num, count, "image")
    video_lists = media_by_prompt(videos, videos_num, count, "video")
    if texts is None and (any(image_lists) or any(video_lists)):
        raise ArgumentError("generate: images and videos need all_prompts, the text with their placeholders")
    return [
        Prompt(
            token_ids=_ints(token_ids[index]) if token_ids is not None else None,
            text=strip_placeholders(texts[index], image_lists[index], video_lists[index])
            if texts is not None
            else None,
            images=image_lists[index],
            videos=video_lists[index],
        )
        for index in range(count)
    ]


def media_by_prompt(
    media: Sequence[Any] | None, counts: Sequence[int] | None, prompts: int, kind: str
) -> list[tuple[Any, ...]]:
    """The media of each prompt. ``None`` entries stand for no media."""
    if media is None:
        if counts is not None and any(counts):
            raise ArgumentError(f"generate: {kind}s_num asks for {sum(counts)} {kind}s, and there are none")
        return [()] * prompts
    if counts is not None and len(counts) != prompts:
        raise ArgumentError(f"generate: {kind}s_num has {len(counts)} counts for {prompts} prompts")
    nested = len(media) == prompts and all(item is None or isinstance(item, (list, tuple)) for item in media)
    if nested and (counts is None or [len(item or ()) for item in media] == list(counts)):
        return [_present(item or ()) for item in media]
    if counts is None:
        if len(media) != prompts:
            raise ArgumentError(f"generate: {len(media)} {kind}s for {prompts} prompts; nest them, or give {kind}s_num")
        return [_present([item]) for item in media]
    if sum(counts) != len(media):
        raise ArgumentError(f"generate: {kind}s_num adds up to {sum(counts)}, and there are {len(media)} {kind}s")
    ends = [sum(counts[: index + 1]) for index in range(prompts)]
    return [_present(media[end - number : end]) for end, number in zip(ends, counts, strict=True)]


def strip_placeholders(text: str, images: Sequence[Any], videos: Sequence[Any]) -> str:
    """``text`` without the placeholders of what it has none of."""
    text = text if images else _IMAGE.sub("", text)
    return text if videos else _VIDEO.sub("", text)


def prompts_of_inputs(inputs: Sequence[dict[str, Any]]) -> list[Prompt]:
    """From LightRFT's dicts: ``{"prompt": text, "multi_modal_data": {"image": [...], "video": [...]}}``."""
    prompts = []
    for item in inputs:
        if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
            raise ArgumentError(
                f"generate: {item!r} has no 'prompt'; wanted {{'prompt': text, 'multi_modal_data': ...}}"
            )
        media = item.get("multi_modal_data") or {}
        images, videos = _listed(media.get("image")), _listed(media.get("video"))
        text = strip_placeholders(item["prompt"], images, videos)
        prompts.append(
            Prompt(text=text, token_ids=_optional_ints(item.get("prompt_token_ids")), images=images, videos=videos)
        )
    return prompts


def prompts_of_tokens(token_ids: Sequence[Any]) -> list[Prompt]:
    """From lists of token ids, or one such list; arrays and tensors are as good."""
    given = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if len(given) and all(isinstance(token, Integral) for token in given):
        given = [given]
    return [Prompt(token_ids=_ints(tokens)) for tokens in given]


def one_kind_of_prompts(token_ids: Sequence[Any] | None, inputs: Sequence[dict[str, Any]] | None) -> list[Prompt]:
    """From token ids or from LightRFT's dicts; raises `ArgumentError` for neither or both."""
    if (token_ids is None) == (inputs is None):
        got = "neither" if token_ids is None else "both"
        raise ArgumentError(f"engine_generate_local: give prompt_token_ids or multi_modal_inputs; got {got}")
    return prompts_of_tokens(token_ids) if token_ids is not None else prompts_of_inputs(inputs or [])


def _ints(tokens: Any) -> tuple[int, ...]:
    """Token ids, from a list, an array or a tensor of integers."""
    plain = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        raise ArgumentError(f"generate: a prompt's token ids are {tokens!r}; wanted a list of integers for each prompt")
    strange = [token for token in plain if isinstance(token, bool) or not isinstance(token, Integral) or token < 0]
    if strange:
        raise ArgumentError(f"generate: {strange[0]!r} is among a prompt's token ids; wanted integers from 0 on")
    return tuple(map(int, plain))


def _optional_ints(tokens: Any) -> tuple[int, ...] | None:
    return None if tokens is None else _ints(tokens)


def _present(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(item for item in items if item is not None)


def _listed(media: Any) -> tuple[Any, ...]:
    return _present(media if isinstance(media, (list, tuple)) else [media])
