"""A small Qwen2-VL of transformers with a tokenizer and processor of its own, and small pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import GREEDY, rollout, trained_copy
from PIL import Image

SPECIAL = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["what", "is", "this", "and", "that", "a", "red", "blue", "picture", "film", "?", "."]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def ids() -> dict[str, int]:
    """Token ids."""
    return {word: number for number, word in enumerate([*SPECIAL, *WORDS, "<unk>"])}


def model(seed: int = 3) -> Any:
    """The model, the same each time."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    known = ids()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "in_chans": 3},
        image_token_id=known["<|image_pad|>"], video_token_id=known["<|video_pad|>"],
        vision_start_token_id=known["<|vision_start|>"], vision_end_token_id=known["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Qwen2VLForConditionalGeneration(config)
        for parameter in made.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def processor() -> Any:
    """Its tokenizer and its preprocessing of pictures and videos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    words = Tokenizer(models.WordLevel(ids(), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:]
    )
    small = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**small),
    )


def save(folder: Path) -> str:
    """All of it as a Hugging Face directory."""
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def picture(color: str, size: tuple[int, int] = (56, 28)) -> Image.Image:
    """A picture with something on it."""
    made = Image.new("RGB", size, color)
    made.paste("white", (4, 4, 20, 16))
    return made


def film(color: str, frames: int = 4) -> list[Image.Image]:
    """A video: a white square on its way."""
    pictures = []
    for frame in range(frames):
        pixels = np.array(Image.new("RGB", (28, 28), color))
        pixels[4:12, 4 + 4 * frame : 12 + 4 * frame] = 255
        pictures.append(Image.fromarray(pixels))
    return pictures


def greedy(made: Any, text: str, images: list[Any], videos: list[Any], count: int) -> tuple[int, ...]:
    """The tokens that transformers generates."""
    arrays = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
    inputs = processor()(text=[text], images=images or None, videos=arrays or None, return_tensors="pt")
    with torch.no_grad():
        tokens_1T = made.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(tokens_1T[0, inputs["input_ids"].shape[1] :].tolist())


def text_beside_pictures(engine: str, folder: Path, **settings: Any) -> None:
    """Rank 0 has prompts without pictures, rank 1 one with pictures and one without: each gets its own completions."""
    path, actor = save(folder / os.environ["RANK"]), model().train()
    with rollout(engine, "fsdp", model=actor, pretrain=path, engine_kv_cache_bytes=2**26, **settings) as (
        made,
        actor,
        _,
    ):
        for parameter in actor.parameters():
            parameter.data.mul_(1.05)
        made.update_engine_weights(actor)
        reference = trained_copy(made, actor, model())
        texts = ["what is this ?"], [f"what is {IMAGE} and {IMAGE} ?", "a red film"]
        images = [[]], [[picture("red", (84, 56)), picture("blue", (56, 84))], []]
        rank_prompts = texts[made.get_rank()], images[made.get_rank()]
        completions = made.gather_and_generate(GREEDY, all_prompts=rank_prompts[0], all_images=rank_prompts[1])
        wanted = [
            greedy(reference, text, pictures, [], GREEDY["max_tokens"])
            for text, pictures in zip(*rank_prompts, strict=True)
        ]
        assert [completion.output_token_ids for completion in completions] == wanted
