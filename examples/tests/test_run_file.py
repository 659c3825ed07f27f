"""The file of settings of the demo, read by the parser of the demo."""

import sys
from pathlib import Path

import pytest

from lightrft.config import StrategyConfig

DEMO = Path(__file__).parents[1] / "rlvr_arithmetic"


def test_the_parser_of_the_demo_reads_the_file(monkeypatch):
    monkeypatch.syspath_prepend(DEMO)
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(DEMO / "run.yaml"), "--steps=2", "--pretrain=model"])
    args = train.arguments()
    assert (args.strategy, args.zero_stage, args.engine_type, args.steps, args.prompts) == (
        "deepspeed", 2, "transformers", 2, 16,
    )  # fmt: skip
    assert StrategyConfig.from_args(args).actor_learning_rate == 2e-5


@pytest.mark.parametrize(
    ("text", "options", "ranks"),
    [
        ("strategy: fake", [], 1),
        ("strategy: fake", ["--strategy=fsdp"], 2),
        ("strategy: deepspeed", ["--strategy", "fake"], 1),
        ("seed: 1", [], 2),
    ],
)
def test_the_launcher_reads_the_file_too(monkeypatch, tmp_path, text, options, ranks):
    monkeypatch.syspath_prepend(DEMO)
    import run

    commands, measured = [], []
    (tmp_path / "run.yaml").write_text(f"{text}\nlog_dir: logs\n")
    monkeypatch.setattr(run, "unpack", lambda model: None)
    monkeypatch.setattr(run, "wait_for", lambda command, environment: commands.append(command) or 0)
    monkeypatch.setattr(run, "gain", lambda folder: measured.append(str(folder)) or 5.0)
    monkeypatch.setattr(sys, "argv", ["run.py", "--least-gain=1", "--config", str(tmp_path / "run.yaml"), *options])
    assert run.main() == 0 and measured == ["logs"]
    assert ("torch.distributed.run" in commands[0]) == (ranks == 2)


def test_the_launcher_divides_the_cores_and_leaves_the_callers_choice(monkeypatch):
    monkeypatch.syspath_prepend(DEMO)
    import run

    environments = []
    monkeypatch.setattr(run, "unpack", lambda model: None)
    monkeypatch.setattr(run, "wait_for", lambda command, environment: environments.append(environment) or 0)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: range(6))
    monkeypatch.setattr(sys, "argv", ["run.py", "--ranks=2"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run.main()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run.main()
    assert [(each["OMP_NUM_THREADS"], each["OMP_WAIT_POLICY"]) for each in environments] == [
        ("3", "PASSIVE"), ("1", "PASSIVE"),
    ]  # fmt: skip


def test_the_launcher_refuses_a_damaged_file(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(DEMO)
    import run

    (tmp_path / "run.yaml").write_text("seed: [1")
    monkeypatch.setattr(run, "unpack", lambda model: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit):
        run.main()
    assert "expected valid YAML" in capsys.readouterr().err
