"""What an engine with model code of its own is built from: a directory, and the weights that a sync owes it.

Where there is a model at ``pretrain``, it is that. Where there is only an actor, its configuration is written to
a directory of its own, which lives as long as the engine.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lightrft.config import EngineError
from lightrft.engines.checkpoint import due_shapes, expected_shapes, stored_shapes
from lightrft.engines.own_folder import OwnFolder
from lightrft.strategy import EngineRequest
from lightrft.strategy.rollout import saved_form


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
    end_ids: frozenset[int]
    """End-of-sequence token ids, by the model's own configuration."""
    _temporary: OwnFolder | None = None

    @classmethod
    def of(cls, request: EngineRequest, engine: str) -> Self:
        """Raises `EngineError` where there is neither a model nor an actor, or the actor is not of transformers."""
        if request.model_path is not None:
            return cls._of_model(request.model_path, request)
        if request.skeleton is None:
            raise EngineError(
                f"engine {engine!r} was given neither a model nor an actor; pass a model directory as `pretrain`, or "
                f"setup_inference_engine(..., actor=actor)"
            )
        return cls._of_actor(request.skeleton, engine)

    @classmethod
    def _of_model(cls, path: str, request: EngineRequest) -> Self:
        trusted = bool(request.config.get_extra_arg("trust_remote_code", False))
        config, directory = _config(path, trusted), _directory(path)
        return cls(
            path=path,
            loads_weights=request.skeleton is None,
            stores_weights=stored_shapes(directory) is not None or any(directory.glob("*.bin")),
            has_tokenizer=any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")),
            expected=_expected(directory, config, request.skeleton),
            vocabulary=vocabulary_of(config),
            end_ids=_end_ids(config) | _end_ids(_generation_config(directory)),
        )

    @classmethod
    def _of_actor(cls, skeleton: nn.Module, engine: str) -> Self:
        from transformers import PreTrainedModel

        if not isinstance(skeleton, PreTrainedModel):
            raise EngineError(
                f"engine {engine!r} runs models of transformers, and the actor is a {type(skeleton).__name__}; use "
                f"engine 'fake', which takes any module"
            )
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
            end_ids=_end_ids(getattr(skeleton, "generation_config", None)) or _end_ids(skeleton.config),
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


def _config(path: str, trusted: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=trusted)


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


def _end_ids(holder: Any) -> frozenset[int]:
    found = getattr(holder, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)
