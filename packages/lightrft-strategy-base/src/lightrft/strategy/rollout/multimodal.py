"""Building a `Prompt` for each prompt from the lists that a trainer passes: token ids, text, images, videos.

Media come nested, with a list for each prompt, or flat, in one list with a count for each prompt. From a prompt without
images, the placeholders of images are removed; the same holds for videos.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol

from lightrft.config import ArgumentError
from lightrft.strategy.rollout.engine import Prompt

_IMAGE = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>")
_MODALITIES = ("image", "video", "audio")
_VIDEO = re.compile(r"<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>")


class InputsBuilder(Protocol):
    """LightRFT's hook ``_build_multimodal_inputs``, which a script may replace, for example to pass audio."""

    def __call__(
        self, *, all_prompts: object, all_images: object, images_num: object, all_videos: object, videos_num: object
    ) -> list[dict[str, Any]]:
        """Return ``{"prompt": text, "multi_modal_data": {"image": [...], "video": [...], "audio": [...]}}`` by prompt."""


def multimodal_inputs(
    *, all_prompts: Any, all_images: Any, images_num: Any, all_videos: Any, videos_num: Any
) -> list[dict[str, Any]]:
    """Return images and videos by prompt, in LightRFT's form; see `InputsBuilder`."""
    prompts = build_prompts(None, all_prompts, all_images, images_num, all_videos, videos_num)
    return [
        {"prompt": prompt.text, "multi_modal_data": {"image": [*prompt.images], "video": [*prompt.videos]}}
        for prompt in prompts
    ]


def build_prompts_with(
    build_inputs: InputsBuilder, token_ids: Any, texts: Any, images: Any, images_num: Any, videos: Any, videos_num: Any
) -> list[Prompt]:
    """Return what `build_prompts` does, or, if a script replaced ``build_inputs``, what that does with media."""
    if build_inputs is multimodal_inputs or not (_any_present(images) or _any_present(videos)):
        return build_prompts(token_ids, texts, images, images_num, videos, videos_num)
    return prompts_of_inputs(
        build_inputs(
            all_prompts=texts, all_images=images, images_num=images_num, all_videos=videos, videos_num=videos_num
        )
    )


def _any_present(media: Sequence[Any] | None) -> bool:
    return media is not None and any(item is not None for item in media)


def build_prompts(
    token_ids: Sequence[Sequence[int]] | None,
    texts: Sequence[str] | None,
    images: Sequence[Any] | None,
    images_num: Sequence[int] | None,
    videos: Sequence[Any] | None,
    videos_num: Sequence[int] | None,
) -> list[Prompt]:
    """Return a `Prompt` for each prompt; see `StrategyBase.gather_and_generate` for the arguments.

    Raises:
        ArgumentError: The lists do not match.
    """
    token_ids, texts = _token_lists(token_ids, "gather_and_generate"), _plain(texts)
    images, videos = (list(media) if isinstance(media, Iterator) else media for media in (images, videos))
    images_num, videos_num = _plain(images_num), _plain(videos_num)
    _check_prompts(token_ids, texts)
    count = len(token_ids if token_ids is not None else texts or ())
    image_lists = media_by_prompt(images, images_num, count, "image")
    video_lists = media_by_prompt(videos, videos_num, count, "video")
    if texts is None and (any(image_lists) or any(video_lists)):
        raise ArgumentError(
            "gather_and_generate: expected texts with the placeholders of images and videos, got none. Pass all_prompts"
        )
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


def _check_prompts(token_ids: Any, texts: Any) -> None:
    if isinstance(texts, str):
        raise ArgumentError(
            f"gather_and_generate: expected a list of texts as all_prompts, got one text, {texts[:40]!r}. Pass [text]"
        )
    if token_ids is None and texts is None:
        raise ArgumentError(
            "gather_and_generate: expected all_prompt_token_ids or all_prompts, got neither. Pass at least one"
        )
    wrong = [text for text in texts or () if not isinstance(text, str)]
    if wrong:
        raise ArgumentError(
            f"gather_and_generate: expected strings as all_prompts, got a {type(wrong[0]).__name__}. Pass token ids as "
            f"all_prompt_token_ids"
        )
    if token_ids is not None and texts is not None and len(texts) != len(token_ids):
        raise ArgumentError(
            f"gather_and_generate: expected the same prompts as token ids and as text, got {len(token_ids)} as token ids and "
            f"{len(texts)} as text. Pass both lists in the same order"
        )


def media_by_prompt(
    media: Sequence[Any] | None, counts: Sequence[int] | None, prompts: int, modality: str
) -> list[tuple[Any, ...]]:
    """Return the media of each prompt.

    Args:
        media: A list for each prompt; or one list of all media. Entries that are None are skipped.
        counts: Number of media of each prompt, if ``media`` is one flat list.
        prompts: Number of prompts.
        modality: "image" or "video", for messages.

    Raises:
        ArgumentError: The numbers do not match.
    """
    if media is None:
        if counts is not None and any(counts):
            raise ArgumentError(
                f"gather_and_generate: expected {sum(counts)} {modality}s, the sum of {modality}s_num, got none. Pass them as "
                f"all_{modality}s"
            )
        return [()] * prompts
    if counts is not None and len(counts) != prompts:
        raise ArgumentError(
            f"gather_and_generate: expected {modality}s_num to have a count for each of {prompts} prompts, got {len(counts)}. "
            f"Use 0 for a prompt without {modality}s"
        )
    nested = len(media) == prompts and all(item is None or isinstance(item, (list, tuple)) for item in media)
    if nested and (counts is None or [len(item or ()) for item in media] == list(counts)):
        return [_present(item or ()) for item in media]
    if counts is None:
        if len(media) != prompts:
            raise ArgumentError(
                f"gather_and_generate: expected one entry of all_{modality}s per prompt ({prompts}), got {len(media)}. Pass a "
                f"list for each prompt, or {modality}s_num"
            )
        return [_present([item]) for item in media]
    if sum(counts) != len(media):
        raise ArgumentError(
            f"gather_and_generate: expected {sum(counts)} {modality}s, the sum of {modality}s_num, got {len(media)}. Correct "
            f"{modality}s_num"
        )
    ends = [sum(counts[: index + 1]) for index in range(prompts)]
    return [_present(media[end - number : end]) for end, number in zip(ends, counts, strict=True)]


def strip_placeholders(text: str, images: Sequence[Any], videos: Sequence[Any]) -> str:
    """Return ``text`` without placeholders of images or videos that the prompt does not have."""
    text = text if images else _IMAGE.sub("", text)
    return text if videos else _VIDEO.sub("", text)


def prompts_of_inputs(inputs: Sequence[dict[str, Any]]) -> list[Prompt]:
    """Return prompts from LightRFT's dicts; see `InputsBuilder`."""
    prompts = []
    for item in inputs:
        if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
            raise ArgumentError(
                f"engine_generate_local: expected dicts {{'prompt': text, 'multi_modal_data': ...}}, got {item!r}. Pass one for "
                f"each prompt"
            )
        media = item.get("multi_modal_data") or {}
        unknown = [modality for modality in media if modality not in _MODALITIES]
        if unknown:
            raise ArgumentError(
                f"engine_generate_local: expected multi_modal_data with {', '.join(_MODALITIES)}, got {unknown[0]!r}. Rename or "
                f"remove it"
            )
        images, videos, audios = (_listed(media.get(modality)) for modality in _MODALITIES)
        text = strip_placeholders(item["prompt"], images, videos)
        prompts.append(
            Prompt(
                text=text, token_ids=_optional_ints(item.get("prompt_token_ids")), images=images, videos=videos,
                audios=audios,
            )
        )  # fmt: skip
    return prompts


def prompts_of_tokens(token_ids: Sequence[Any]) -> list[Prompt]:
    """Return prompts from lists, arrays or tensors of token ids, a tokenizer's output, or a single prompt."""
    lists = _token_lists(token_ids, "engine_generate_local")
    if len(lists) and all(isinstance(token, Integral) for token in lists):
        lists = [lists]
    return [Prompt(token_ids=_ints(tokens)) for tokens in lists]


def one_kind_of_prompts(token_ids: Sequence[Any] | None, inputs: Sequence[dict[str, Any]] | None) -> list[Prompt]:
    """Return prompts from token ids or from LightRFT's dicts. Raise `ArgumentError` for neither or both."""
    if (token_ids is None) == (inputs is None):
        got = "neither" if token_ids is None else "both"
        raise ArgumentError(
            f"engine_generate_local: expected either prompt_token_ids or multi_modal_inputs, got {got}. Pass exactly one"
        )
    return prompts_of_tokens(token_ids) if token_ids is not None else prompts_of_inputs(_plain(inputs) or [])


def _plain(items: object) -> Any:
    """Return a list of what an iterator, an array or a tensor has; anything else unchanged."""
    if isinstance(items, Iterator):
        return list(items)
    return items.tolist() if hasattr(items, "tolist") else items


def _token_lists(token_ids: object, call: str) -> Any:
    """Return token ids by prompt. From a tokenizer's output, takes those that its attention mask does not exclude."""
    if isinstance(token_ids, Mapping):
        if "input_ids" not in token_ids:
            raise ArgumentError(
                f"{call}: expected token ids of prompts or a tokenizer's output, got a {type(token_ids).__name__} without "
                f"input_ids: {', '.join(map(str, list(token_ids)[:5]))}"
            )
        return _unpadded(token_ids["input_ids"], token_ids.get("attention_mask"))
    if isinstance(token_ids, (str, bytes)):
        raise ArgumentError(
            f"{call}: expected token ids of prompts, got a text, {token_ids[:40]!r}. Pass it as all_prompts"
        )
    plain = _plain(token_ids)
    if plain is not None and not isinstance(plain, Sequence):
        raise ArgumentError(f"{call}: expected a list of token ids for each prompt, got a {type(token_ids).__name__}")
    return plain


def _unpadded(input_ids: object, mask: object) -> Any:
    """Return ``input_ids``, of one prompt or of several, without the positions where ``mask`` is 0."""
    ids, kept = _plain(input_ids), _plain(mask)
    if kept is None:
        return ids
    if all(isinstance(token, Integral) for token in ids):
        return [token for token, keep in zip(ids, kept, strict=True) if keep]
    return [_unpadded(*row) for row in zip(ids, kept, strict=True)]


def _ints(tokens: object) -> tuple[int, ...]:
    """Return the token ids in a list, an array or a tensor of integers."""
    plain = _token_lists(tokens, "generate") if isinstance(tokens, Mapping) else _plain(tokens)
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        raise ArgumentError(
            f"generate: expected a list of integers for each prompt, got {str(tokens)[:60]!r}. Pass text as all_prompts"
        )
    invalid = [token for token in plain if isinstance(token, bool) or not isinstance(token, Integral) or token < 0]
    if invalid:
        raise ArgumentError(f"generate: expected token ids that are integers from 0, got {invalid[0]!r}")
    return tuple(map(int, plain))


def _optional_ints(tokens: object) -> tuple[int, ...] | None:
    return None if tokens is None else _ints(tokens)


def _present(items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(item for item in items if item is not None)


def _listed(media: object) -> tuple[Any, ...]:
    return _present(media if isinstance(media, (list, tuple)) else [media])
