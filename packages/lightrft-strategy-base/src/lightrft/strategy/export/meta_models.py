"""Models on the meta device, built from their configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lightrft.config import BackendNotInstalledError, CheckpointError


def model_of(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Return the transformers model of the configuration files in ``folder``."""
    try:
        import transformers
    except ImportError as error:
        raise _not_installed("transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected a configuration that transformers can read, got an error: {error}. Pass the base model with --base"
        ) from error
    with torch.device("meta"):
        model = _built(transformers, config, trust_remote_code)
    if (folder / "generation_config.json").exists():
        model.generation_config = None  # the file is kept
    return cast(nn.Module, model)


def _built(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is not None:
        return model_class._from_config(config)
    for auto in (value for key, value in vars(transformers).items() if key.startswith("AutoModel")):
        if auto.__name__ in getattr(config, "auto_map", {}):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    raise CheckpointError(
        f"expected a model of transformers {transformers.__version__}, got a configuration of {name}. Pass the base model with "
        f"its code: --base and --trust-remote-code"
    )


def with_adapters(model: nn.Module, configurations: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return ``model`` inside a PEFT model with these adapters, or ``model`` itself if there are none."""
    if not configurations:
        return model
    try:
        import peft
    except ImportError as error:
        raise _not_installed("peft") from error
    (first, config), *others = (
        (name, peft.PeftConfig.from_peft_type(**settings)) for name, settings in configurations.items()
    )
    # PEFT records the name of the model, which may be that of a temporary directory, in place of the base model's
    cast(Any, model).name_or_path = config.base_model_name_or_path
    with torch.device("meta"):
        wrapped: Any = peft.get_peft_model(model, config, adapter_name=first)
        for name, other in others:
            wrapped.add_adapter(name, other)
    return cast(nn.Module, wrapped)


def _not_installed(package: str) -> BackendNotInstalledError:
    return BackendNotInstalledError(
        f"expected {package}, which defines the tensor names of this model, got none. Install it: "
        f"pip install 'lightrft-strategy-base[{package}]'"
    )
