"""The model that an engine with its own model code is built from: a directory, and the weights of each sync.

With `pretrain`, the directory is that model's. With an actor alone, the actor's configuration is written to a temporary
directory that exists as long as the engine.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from lightrft.config import ConfigError, EngineError
from lightrft.engines.expected_weights import delivered_shapes, expected_shapes, stored_shapes
from lightrft.engines.settings import EngineSettings
from lightrft.engines.temporary_directory import TemporaryDirectory
from lightrft.strategy.engine import (
    EngineRequest,
    check_decoder_only,
    eos_token_ids_of,
    eos_token_ids_of_model,
    weight_shapes,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class ModelSource:
    """A model directory, and what is known about its weights."""

    path: str
    loads_weights: bool
    """Whether the engine starts with the weights at ``path``; else it has none until the first sync."""
    stores_weights: bool
    """Whether there are weights at ``path``."""
    has_tokenizer: bool
    expected: Mapping[str, torch.Size] | None
    """Names, as the sender has them, and shapes of the weights that every sync must deliver."""
    vocab_size: int
    """Exclusive upper bound of token ids, placeholders of media included."""
    max_model_len: int | None
    """The longest sequence in tokens, prompt included; None if the model's configuration sets no limit."""
    eos_token_ids: frozenset[int]
    """End-of-sequence token ids in the model's configurations."""
    tokenizer_eos_token_ids: frozenset[int] = frozenset()
    """Those of the tokenizer."""
    _temporary: TemporaryDirectory | None = None

    @classmethod
    def of(cls, request: EngineRequest, engine: str) -> Self:
        """The source for ``request``.

        Args:
            request: Has a model path, or an actor on the meta device.
            engine: The engine's name, for messages.

        Raises:
            EngineError: There is neither a model nor an actor, the actor is not a transformers model, or the model is an
                encoder-decoder.
        """
        if request.model_path is not None:
            return cls._of_model(str(request.model_path), request, engine)
        if request.meta_model is None:
            raise EngineError(
                f"setup_inference_engine: engine {engine!r} expected a model or an actor, got neither. Pass a model "
                f"directory as `pretrain`, or setup_inference_engine(..., actor=actor)"
            )
        return cls._of_actor(request.meta_model, engine, EngineSettings.of(request.config))

    @classmethod
    def _of_model(cls, path: str, request: EngineRequest, engine: str) -> Self:
        settings = EngineSettings.of(request.config)
        trusted = settings.trust_remote_code
        config, directory = _open_config(path, trusted=trusted)
        check_decoder_only(config, engine)
        tokenizer = tokenizer_at(directory, trusted=trusted)
        return cls(
            path=path,
            loads_weights=request.meta_model is None,
            stores_weights=stored_shapes(directory) is not None or any(directory.glob("*.bin")),
            has_tokenizer=tokenizer is not None,
            expected=_expected(directory, config, request.meta_model),
            vocab_size=vocab_size_of(config),
            max_model_len=max_model_len_of(config, settings, directory),
            eos_token_ids=eos_token_ids_of(config, _generation_config(directory)),
            tokenizer_eos_token_ids=eos_token_ids_of(tokenizer),
        )

    @classmethod
    def _of_actor(cls, meta_model: nn.Module, engine: str, settings: EngineSettings) -> Self:
        from transformers import PreTrainedModel

        if not isinstance(meta_model, PreTrainedModel):
            raise EngineError(
                f"setup_inference_engine: engine {engine!r} expected a transformers model as actor, got a "
                f"{type(meta_model).__name__}. Use engine 'fake', which takes any module"
            )
        check_decoder_only(meta_model.config, engine)
        max_model_len = max_model_len_of(meta_model.config, settings)
        temporary = TemporaryDirectory(engine)
        config = copy.deepcopy(meta_model.config)
        config.architectures = [type(meta_model).__name__]
        config.save_pretrained(temporary.path)
        return cls(
            path=temporary.path,
            loads_weights=False,
            stores_weights=False,
            has_tokenizer=False,
            expected=weight_shapes(meta_model),
            vocab_size=vocab_size_of(meta_model.config),
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids_of_model(meta_model),
            _temporary=temporary,
        )

    def close(self) -> None:
        """Remove the temporary directory, if there is one. May be called twice."""
        if self._temporary is not None:
            self._temporary.remove()


def _expected(
    directory: Path, config: "PretrainedConfig", meta_model: nn.Module | None
) -> Mapping[str, torch.Size] | None:
    stored = stored_shapes(directory)
    sent = None if meta_model is None else weight_shapes(meta_model)
    if stored is None:
        return sent
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    ignored = getattr(meta_model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return expected_shapes(delivered_shapes(stored, tied=tied, ignored=ignored), sent or ())


def _open_config(path: str, *, trusted: bool) -> tuple["PretrainedConfig", Path]:
    """The configuration of the model at ``path``, and the directory of its files."""
    from transformers import AutoConfig

    with opening(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trusted), _directory(path)


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Raise an `EngineError` that names ``path`` if the body, which opens the model there, fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise EngineError(
            f"pretrain: expected a model at {path!r}, got {type(error).__name__} when opening it: {error}. Pass a directory in "
            f"Hugging Face's layout, or the name of a model on the Hub"
        ) from error


def _directory(path: str) -> Path:
    """``path``, or the directory in the cache if it is the name of a model on the Hub."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


def _generation_config(directory: Path) -> "GenerationConfig | None":
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(directory) if (directory / "generation_config.json").exists() else None


def vocab_size_of(config: "PretrainedConfig") -> int:
    """The exclusive upper bound of a prompt's token ids: those of text, and placeholders of media."""
    special = (value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index")))
    return max(int(config.get_text_config().vocab_size), *(value + 1 for value in special if isinstance(value, int)), 0)


def max_model_len_of(config: "PretrainedConfig", settings: EngineSettings, directory: Path | None = None) -> int | None:
    """The longest sequence in tokens that model, tokenizer and ``engine_max_model_len`` allow; None without a limit.

    As vLLM and SGLang count, a plain scaling factor of the positions multiplies their number.

    Args:
        config: The model's configuration.
        settings: May name a shorter length.
        directory: Has the tokenizer's configuration.

    Raises:
        ConfigError: ``engine_max_model_len`` is longer than the model allows.
    """
    text = config.get_text_config()
    scaling = getattr(text, "rope_parameters", None) or {}
    factor = scaling.get("factor") or 1.0 if scaling.get("rope_type") in ("linear", "dynamic") else 1.0
    positions = getattr(text, "max_position_embeddings", None)
    limits = [
        limit for limit in (positions and int(positions * factor), _tokenizer_limit(directory)) if limit and limit > 0
    ]
    wanted = settings.max_model_len
    if wanted is not None and limits and wanted > min(limits):
        raise ConfigError(
            f"engine_max_model_len: expected at most the model's {min(limits)} tokens, got {wanted}. Lower it"
        )
    return wanted or min(limits, default=None)


def _tokenizer_limit(directory: Path | None) -> int | None:
    file = None if directory is None else directory / "tokenizer_config.json"
    if file is None or not file.exists():
        return None
    limit = json.loads(file.read_text(encoding="utf-8")).get("model_max_length")
    return int(limit) if isinstance(limit, (int, float)) else None


def tokenizer_at(directory: Path, *, trusted: bool) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a model's directory, or None if there is none. ``trusted``: whether its own code may run."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    with opening(str(directory)):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
