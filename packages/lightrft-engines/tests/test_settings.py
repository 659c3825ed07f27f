"""The extra arguments of engines: what they set, and that bad values are refused before an engine is built."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lightrft.config import ConfigError, EngineError, StrategyConfig
from lightrft.engines.model_source import ModelSource, max_model_len_of
from lightrft.engines.settings import EngineSettings
from lightrft.engines.transformers import TransformersEngine
from lightrft.strategy import EngineRequest


def settings(**extra):
    return EngineSettings.of(StrategyConfig.from_args(extra))


def test_the_engine_decides_what_is_not_set():
    extra = settings(limit_mm_image_per_prompt=-1, limit_mm_video_per_prompt=0, engine_kv_cache_bytes="4096")
    assert (extra.kv_cache_bytes, extra.max_model_len, extra.eager) == (4096, None, None)
    assert extra.media_limits == {"video": 0}
    assert not extra.trust_remote_code
    assert not extra.verifies


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("engine_kv_cache_bytes", "1GB", "an integer >= 1"),
        ("engine_max_sequences", 0, "an integer >= 1"),
        ("engine_max_model_len", 12.5, "an integer >= 1"),
        ("limit_mm_image_per_prompt", True, "an integer >= -1"),
        ("engine_eager", "false", "True or False"),
        ("trust_remote_code", "no", "True or False"),
        ("engine_arguments", [1], "a mapping"),
        ("weight_sync_verify", "crc", "'checksum'"),
    ],
)
def test_a_bad_value_is_refused(name, value, allowed):
    with pytest.raises(ConfigError, match=f"{name}: expected {allowed}.*, got {re.escape(repr(value))}"):
        settings(**{name: value})


def test_an_unknown_name_is_warned_of():
    with pytest.warns(
        UserWarning, match="'engine_max_model_length' is not an extra .*Did you mean 'engine_max_model_len'?"
    ):
        settings(engine_max_model_length=8)


def test_the_longest_sequence_is_what_model_tokenizer_and_settings_allow(tmp_path):
    plain = LlamaConfig(max_position_embeddings=100)
    scaled = LlamaConfig(
        max_position_embeddings=100, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    )
    assert max_model_len_of(plain, settings()) == 100
    assert max_model_len_of(scaled, settings()) == 400
    assert max_model_len_of(plain, settings(engine_max_model_len=60), tmp_path) == 60
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 80}')
    assert max_model_len_of(plain, settings(), tmp_path) == 80
    with pytest.raises(ConfigError, match="engine_max_model_len: expected at most the model's 80 tokens, got 90"):
        max_model_len_of(plain, settings(engine_max_model_len=90), tmp_path)


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_missing_model_is_named(tmp_path: Path, content):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        (path / "config.json").write_text(content)
    request = EngineRequest(
        config=StrategyConfig(), device=torch.device("cpu"), rank=0, group=None, model_path=str(path), meta_model=None
    )
    for build in (lambda: ModelSource.of(request, "sample"), lambda: TransformersEngine.build(request)):
        with pytest.raises(EngineError, match=f"pretrain: expected a model at '{path}', got "):
            build()
