"""The extra arguments of engines: what they mean, and that nonsense is refused before anything is built."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lightrft.config import ConfigError, EngineError, StrategyConfig
from lightrft.engines.settings import EngineSettings
from lightrft.engines.source import ModelSource, longest_sequence
from lightrft.engines.transformers import TransformersEngine
from lightrft.strategy import EngineRequest


def settings(**extra):
    return EngineSettings.of(StrategyConfig.from_args(extra))


def test_what_is_not_said_is_left_to_the_engine():
    found = settings(limit_mm_image_per_prompt=-1, limit_mm_video_per_prompt=0, engine_kv_cache_bytes="4096")
    assert (found.kv_cache_bytes, found.max_model_len, found.eager) == (4096, None, None)
    assert found.media_limits == {"video": 0}
    assert not found.trust_remote_code
    assert not found.verifies


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("engine_kv_cache_bytes", "1GB", "a whole number, 1 or more"),
        ("engine_max_sequences", 0, "a whole number, 1 or more"),
        ("engine_max_model_len", 12.5, "a whole number, 1 or more"),
        ("limit_mm_image_per_prompt", True, "a whole number, -1 or more"),
        ("engine_eager", "false", "True and False"),
        ("trust_remote_code", "no", "True and False"),
        ("engine_arguments", [1], "a mapping"),
        ("weight_sync_verify", "crc", "'checksum'"),
    ],
)
def test_nonsense_is_refused(name, value, allowed):
    with pytest.raises(ConfigError, match=f"{name}=.*; allowed (is|are) {allowed}"):
        settings(**{name: value})


def test_a_name_that_means_nothing_is_told():
    with pytest.warns(
        UserWarning, match="'engine_max_model_length' is no extra .*; did you mean 'engine_max_model_len'?"
    ):
        settings(engine_max_model_length=8)


def test_the_longest_sequence_is_what_model_tokenizer_and_settings_allow(tmp_path):
    plain = LlamaConfig(max_position_embeddings=100)
    scaled = LlamaConfig(
        max_position_embeddings=100, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    )
    assert longest_sequence(plain, settings()) == 100
    assert longest_sequence(scaled, settings()) == 400
    assert longest_sequence(plain, settings(engine_max_model_len=60), tmp_path) == 60
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 80}')
    assert longest_sequence(plain, settings(), tmp_path) == 80
    with pytest.raises(ConfigError, match="engine_max_model_len=90 is more than the 80 tokens"):
        longest_sequence(plain, settings(engine_max_model_len=90), tmp_path)


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_model_that_is_not_there_is_named(tmp_path: Path, content):
    path = tmp_path / "model"
    if content is not None:
        path.mkdir()
        (path / "config.json").write_text(content)
    request = EngineRequest(
        config=StrategyConfig(), device=torch.device("cpu"), rank=0, group=None, model_path=str(path), skeleton=None
    )
    for build in (lambda: ModelSource.of(request, "sample"), lambda: TransformersEngine.build(request)):
        with pytest.raises(EngineError, match=f"pretrain='{path}': no model could be opened there"):
            build()
