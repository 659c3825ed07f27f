"""What an engine with model code of its own is built from: a directory, and the weights that a sync owes it.

Where there is a model at ``pretrain``, it is that. Where there is only an actor, its configuration is written to
a directory of its own, which lives as long as the engine.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lightrft.config import ConfigError, EngineError
from lightrft.engines.checkpoint import due_shapes, expected_shapes, stored_shapes
from lightrft.engines.own_folder import OwnFolder
from lightrft.engines.settings import EngineSettings
from lightrft.strategy import EngineRequest
from lightrft.strategy.rollout import saved_form
from lightrft.strategy.rollout.embedded import end_ids_of


@dataclass(kw_only=True)
class ModelSource:
    """A model directory, and what is known of its weights."""

    path: str
    loads_weights: bool
    """The engine begins with the weights at ``path``; else with none, since an actor's will come."""
    stores_weights: bool
    """There are weights at ``path``."""
    has_tokenizer: bool
    expected: Mapping[str, torch.Size] | None
    """Names, as the sender has them, and shapes of what every sync must deliver."""
    vocabulary: int
    """Token ids are below it, placeholders of media included."""
    longest: int | None
    """Tokens of the longest sequence, prompt and all; None where the model's configuration sets no limit."""
    end_ids: frozenset[int]
    """End-of-sequence token ids, by the model's own configuration and its tokenizer's."""
    _temporary: OwnFolder | None = None

    @classmethod
    def of(cls, request: EngineRequest, engine: str) -> Self:
        """Raises `EngineError` where there is neither a model nor an actor, or the actor is not of transformers."""
        if request.model_path is not None:
            return cls._of_model(str(request.model_path), request)
        if request.skeleton is None:
            raise EngineError(
                f"engine {engine!r} was given neither a model nor an actor; pass a model directory as `pretrain`, or "
                f"setup_inference_engine(..., actor=actor)"
            )
        return cls._of_actor(request.skeleton, engine, EngineSettings.of(request.config))

    @classmethod
    def _of_model(cls, path: str, request: EngineRequest) -> Self:
        settings = EngineSettings.of(request.config)
        trusted = settings.trust_remote_code
        config, directory = _found(path, trusted=trusted)
        tokenizer = tokenizer_at(directory, trusted=trusted)
        return cls(
            path=path,
            loads_weights=request.skeleton is None,
            stores_weights=stored_shapes(directory) is not None or any(directory.glob("*.bin")),
            has_tokenizer=tokenizer is not None,
            expected=_expected(directory, config, request.skeleton),
            vocabulary=vocabulary_of(config),
            longest=longest_sequence(config, settings, directory),
            end_ids=end_ids_of(config, _generation_config(directory), tokenizer),
        )

    @classmethod
    def _of_actor(cls, skeleton: nn.Module, engine: str, settings: EngineSettings) -> Self:
        from transformers import PreTrainedModel

        if not isinstance(skeleton, PreTrainedModel):
            raise EngineError(
                f"engine {engine!r} runs models of transformers, and the actor is a {type(skeleton).__name__}; use "
                f"engine 'fake', which takes any module"
            )
        longest = longest_sequence(skeleton.config, settings)
        temporary = OwnFolder(engine)
        config = copy.deepcopy(skeleton.config)
        config.architectures = [type(skeleton).__name__]
        config.save_pretrained(temporary.path)
        return cls(
            path=temporary.path,
            loads_weights=False,
            stores_weights=False,
            has_tokenizer=False,
            expected=_shapes_of(skeleton),
            vocabulary=vocabulary_of(skeleton.config),
            longest=longest,
            end_ids=end_ids_of(getattr(skeleton, "generation_config", None), skeleton.config),
            _temporary=temporary,
        )

    def close(self) -> None:
        """Remove what was written. May be called twice."""
        if self._temporary is not None:
            self._temporary.remove()


def _expected(directory: Path, config: Any, skeleton: nn.Module | None) -> Mapping[str, torch.Size] | None:
    stored = stored_shapes(directory)
    sent = None if skeleton is None else _shapes_of(skeleton)
    if stored is None:
        return sent
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    return expected_shapes(due_shapes(stored, tied=tied, ignored=ignored), sent or ())


def _shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    tensors = saved_form.saved_tensors(module)
    return saved_form.saved_shapes(module, {name: tensor.shape for name, tensor in tensors.items()})


def _found(path: str, *, trusted: bool) -> tuple[Any, Path]:
    """The configuration of the model at ``path``, and the directory of its files."""
    from transformers import AutoConfig

    with opening(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trusted), _directory(path)


@contextmanager
def opening(path: str) -> Iterator[None]:
    """Whatever goes wrong in the body, which opens the model at ``path``, as an `EngineError` that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise EngineError(
            f"pretrain={path!r}: no model could be opened there; wanted is a directory in Hugging Face's layout, or the "
            f"name of a model on the Hub. {type(error).__name__}: {error}"
        ) from error


def _directory(path: str) -> Path:
    """Where the files are: ``path``, or the cache where it is the name of a model on the Hub."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


def _generation_config(directory: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(directory) if (directory / "generation_config.json").exists() else None


def vocabulary_of(config: Any) -> int:
    """Token ids of prompts are below it: of text, and of the places for media."""
    named = (value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index")))
    return max(int(config.get_text_config().vocab_size), *(it + 1 for it in named if isinstance(it, int)), 0)


def longest_sequence(config: Any, settings: EngineSettings, directory: Path | None = None) -> int | None:
    """Tokens that a sequence may have: positions of the model, and what its tokenizer and ``engine_max_model_len`` say.

    As vLLM and SGLang count them: positions that are scaled by a plain factor are so many times more.
    """
    text = config.get_text_config()
    scaling = getattr(text, "rope_parameters", None) or {}
    factor = scaling.get("factor") or 1.0 if scaling.get("rope_type") in ("linear", "dynamic") else 1.0
    positions = getattr(text, "max_position_embeddings", None)
    found = [it for it in (positions and int(positions * factor), _tokenizer_limit(directory)) if it]
    asked = settings.max_model_len
    if asked is not None and found and asked > min(found):
        raise ConfigError(
            f"engine_max_model_len={asked} is more than the {min(found)} tokens that the model is made for"
        )
    return asked or min(found, default=None)


def _tokenizer_limit(directory: Path | None) -> int | None:
    file = None if directory is None else directory / "tokenizer_config.json"
    if file is None or not file.exists():
        return None
    limit = json.loads(file.read_text(encoding="utf-8")).get("model_max_length")
    return int(limit) if isinstance(limit, (int, float)) else None


def tokenizer_at(directory: Path, *, trusted: bool) -> Any:
    """The tokenizer of a model's directory, or None where there is none."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    with opening(str(directory)):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
