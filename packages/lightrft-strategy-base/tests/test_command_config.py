"""`lightrft config`."""

import json
import os

import pytest
from command_line import lightrft, listed, refused

from lightrft.config import StrategyConfig


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to


def test_show_lists_what_differs_from_the_defaults(write):
    file = write("run.yaml", "strategy: fsdp\nbf16: false\nextra_args: {dataset: gsm8k}\n")
    assert listed("config", "show", file) == [
        {"setting": "strategy", "value": "fsdp", "default": "auto", "owner": "strategy"},
        {"setting": "bf16", "value": False, "default": True, "owner": "strategy"},
        {"setting": "extra_args['dataset']", "value": "gsm8k", "default": None, "owner": "trainer"},
    ]
    lines = lightrft("config", "show", file).splitlines()
    assert lines[0].split() == ["setting", "value", "default", "owner"]
    assert lines[2].split() == ["bf16", "false", "true", "strategy"]


def test_show_all_lists_every_setting(write):
    shown = {
        row["setting"]: row["value"] for row in listed("config", "show", "--all", write("run.json", '{"seed": 7}'))
    }
    assert shown.keys() == StrategyConfig.model_fields.keys() - {"extra_args"}
    assert shown["seed"] == 7


def test_defaults_are_reported_as_such(write):
    file = write("run.yaml", "")
    assert lightrft("config", "show", file) == "All settings have their default values.\n"
    assert listed("config", "show", file) == []


def test_check_names_every_error_at_once(write):
    file = write(
        "run.yaml", "zero_stage: 7\ntrain_batch_sise: 3\nbf16: false\ngrad_accum_dtype: bf16\nfsdp_shard_size: 0\n"
    )
    said = lightrft("config", "check", file, code=1).splitlines()
    assert [line.removeprefix(f"{file}: ").split("=")[0].split(":")[0].split()[0] for line in said] == [
        "zero_stage", "'train_batch_sise'", "grad_accum_dtype", "fsdp_shard_size",
    ]  # fmt: skip
    judged = listed("config", "check", file, code=1)
    assert not judged["valid"] and len(judged["errors"]) == 4


def test_toml_and_sections_are_read_as_the_script_reads_them(write):
    file = write("run.toml", 'seed = 7\nengine.type = "sglang"\n[engine.arguments]\nmax_running_requests = 8\n')
    assert {row["setting"]: row["value"] for row in listed("config", "show", file)} == {
        "seed": 7, "engine_type": "sglang", "extra_args['engine_arguments']": {"max_running_requests": 8},
    }  # fmt: skip
    misspelled = write("typo.toml", "[engine]\ntp_sise = 2\n")
    assert listed("config", "check", misspelled, code=1)["errors"] == [
        "'engine_tp_sise' is not a setting. Did you mean 'engine_tp_size'?"
    ]


def test_a_conflict_with_an_invalid_setting_is_not_reported(write):
    file = write("run.yaml", "train_batch_size: many\nmicro_train_batch_size: 3\n")
    assert len(listed("config", "check", file, code=1)["errors"]) == 1


def test_check_of_a_valid_file(write):
    file = write("run.json", json.dumps({"zero_stage": 3}))
    assert lightrft("config", "check", file) == f"{file} is valid\n"
    assert listed("config", "check", file)["valid"]


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "broken.json",
            '{"seed":',
            "expected valid JSON, got: Expecting value: line 1 column 9 (char 8). Correct it there",
        ),
        ("broken.yaml", "seed: [1\n", "expected valid YAML, got: "),
        ("twice.yaml", "seed: 1\nseed: 2\n", "duplicate key 'seed'"),
        ("list.yaml", "- 1\n", "expected a mapping of setting names to values"),
        ("broken.toml", "seed = \n", "expected valid TOML, got: "),
        ("twice.toml", "seed = 1\nseed = 2\n", "duplicate key"),
        ("twice.yaml", "engine.type: vllm\nengine: {type: sglang}\n", "duplicate key 'type'"),
        ("run.txt", "seed = 1\n", "expected a file named .yaml, .yml, .json, .toml"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(write, command, name, text, said):
    file = write(name, text)
    line = refused("config", command, file)
    assert line.startswith(f"lightrft config {command}: ") and said in line and str(file) in line


def test_show_of_invalid_settings_is_one_line(write):
    line = refused("config", "show", write("run.yaml", "zero_stage: 7\nseed: x\n"))
    assert "StrategyConfig: seed: expected" in line and "; zero_stage: expected" in line


@pytest.mark.parametrize("make", ["missing", "directory", "unreadable"])
def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, make):
    file = tmp_path / "run.yaml"
    if make == "directory":
        file.mkdir()
    if make == "unreadable":
        file.touch(mode=0o000)
        if os.access(file, os.R_OK):
            pytest.skip("this user may read every file")
    assert f"cannot read {file}" in refused("config", "check", file)
