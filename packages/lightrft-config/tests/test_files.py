"""--config FILE: what a file sets, below the command line and above the defaults."""

import argparse
import functools
import json
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ConfigError, StrategyConfig


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return to


def parser():
    """The parser of a script with options of its own, one before the settings are added and some after."""
    script = argparse.ArgumentParser(prog="train.py")
    script.add_argument("--steps", "-s", type=int, default=10)
    StrategyConfig.add_arguments(script).set_defaults(train_batch_size=8, micro_train_batch_size=2)
    script.add_argument("--dataset", required=True)
    script.add_argument("--phase", choices=["sft", "rl"], default="sft")
    script.add_argument("--fast", action="store_true")
    script.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True)
    script.add_argument("--layers", nargs="*", type=int, default=[])
    script.add_argument("--ratio", type=float, default=None)
    return script


def parsed(*argv):
    args = parser().parse_args([*argv, "--dataset=d"])
    return args, StrategyConfig.from_args(args)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([*argv, "--dataset=d"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


VALUES = st.none() | st.integers(0, 50)


@given(in_default=VALUES, in_file=VALUES, in_second=VALUES, on_line=VALUES, position=st.integers(0, 2))
def test_defaults_then_files_in_order_then_the_command_line(
    tmp_path_factory, in_default, in_file, in_second, on_line, position
):
    folder = tmp_path_factory.mktemp("config")
    script = parser()
    if in_default is not None:
        script.set_defaults(seed=in_default)
    words = []
    for number, value in enumerate((in_file, in_second)):
        (folder / f"{number}.json").write_text(json.dumps({} if value is None else {"seed": value}))
        words.append(["--config", str(folder / f"{number}.json")])
    words.insert(position, [] if on_line is None else [f"--seed={on_line}"])
    seeds = [value for value in (42, in_default, in_file, in_second, on_line) if value is not None]
    assert script.parse_args([*functools.reduce(operator.iadd, words, []), "--dataset=d"]).seed == seeds[-1]


def test_a_value_on_the_command_line_that_equals_the_default_overrides_the_file_too(write):
    file = write("run.yaml", "seed: 7\nbf16: false\nmax_norm: null\n")
    assert [vars(parsed("--seed", "42", "--bf16", "--config", file)[0])[name] for name in ("seed", "bf16")] == [
        42,
        True,
    ]
    assert parsed("--config", file)[1].max_norm is None


def test_the_same_settings_in_yaml_json_and_toml(write):
    files = [
        write("run.yaml", "actor_learning_rate: 1e-6\nadam_betas: [0.8, 0.9]\nengine: {type: vllm, tp_size: 2}\n"),
        write("run.json", '{"actor_learning_rate": 1e-6, "adam_betas": [0.8, 0.9], "engine.type": "vllm", "engine.tp_size": 2}'),
        write("run.toml", 'actor_learning_rate = 1e-6\nadam_betas = [0.8, 0.9]\n[engine]\ntype = "vllm"\ntp_size = 2\n'),
    ]  # fmt: skip
    configs = [StrategyConfig.from_file(file) for file in files]
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].adam_betas, configs[0].engine_type, configs[0].engine_tp_size) == ((0.8, 0.9), "vllm", 2)
    for file in files:
        assert parsed("--config", file)[1].changed() == {
            **configs[0].changed(), "train_batch_size": 8, "micro_train_batch_size": 2,
            "extra_args": {"steps": 10, "dataset": "d", "phase": "sft", "fast": False, "lora": True, "layers": [], "ratio": None},
        }  # fmt: skip


def test_arguments_of_engines_in_files_and_on_the_command_line(write):
    file = write(
        "run.yaml",
        "engine.arguments.block_size: 16\nengine:\n  max_model_len: 64\n  arguments: {swap_space: 0, seed: 1}\n"
        "trust_remote_code: true\n",
    )
    options = ("--engine.arguments.seed", "2", "--config", file, "--engine.eager=true", "--engine.type", "sglang")
    args, config = parsed(*options)
    assert (args.engine_type, config.engine_type) == ("sglang", "sglang")
    extra = {name: config.extra_args[name] for name in ("engine_arguments", "engine_max_model_len", "engine_eager")}
    assert extra == {
        "engine_arguments": {"block_size": 16, "swap_space": 0, "seed": 2}, "engine_max_model_len": 64, "engine_eager": True
    }  # fmt: skip
    assert StrategyConfig.from_file(file).get_extra_arg("trust_remote_code") is True


@pytest.mark.parametrize("option", ["--engine.tp_size", "--engine.tp-size", "--engine_tp_size", "--engine-tp-size"])
def test_a_setting_of_engines_has_four_spellings_on_the_command_line(option):
    assert parsed(option, "2")[1].engine_tp_size == 2
    name = option.replace("tp", "max").replace("size", "sequences")
    if "." in option:
        assert parsed(name, "3")[1].extra_args["engine_max_sequences"] == 3


def test_options_of_the_script_are_set_by_extra_args_and_checked_by_its_parser(write, capsys):
    file = write(
        "run.yaml",
        "extra_args: {steps: 3, phase: rl, fast: true, lora: false, layers: [1, 2], ratio: 1e-3, dataset: x}\n",
    )
    args = parser().parse_args(["--config", file, "--phase=sft"])  # the file gives the required --dataset
    own = {name: vars(args)[name] for name in ("steps", "phase", "fast", "lora", "layers", "ratio", "dataset")}
    assert own == {
        "steps": 3,
        "phase": "sft",
        "fast": True,
        "lora": False,
        "layers": [1, 2],
        "ratio": 1e-3,
        "dataset": "x",
    }
    with pytest.raises(SystemExit):
        parser().parse_args(["--config", write("run.yaml", "extra_args: {phase: dpo, dataset: x}\n")])
    assert "argument --phase: invalid choice: 'dpo'" in capsys.readouterr().err
    assert "fast: expected True or False, got str ('yes')" in refused(
        capsys, "--config", write("run.yaml", "extra_args: {fast: yes}\n")
    )


def test_a_saved_config_is_a_file_for_the_script(tmp_path):
    args = parser().parse_args(
        ["--seed=7", "--steps=3", "--no-lora", "--layers", "1", "--dataset=d", "--engine.eager=true"]
    )
    config = StrategyConfig.from_args(args)
    config.to_yaml(tmp_path / "run.yaml")
    again = parser().parse_args(["--config", str(tmp_path / "run.yaml")])
    assert StrategyConfig.from_args(again) == config and vars(again) == vars(args)


def test_conflicts_are_judged_with_the_command_line(write):
    file = write("run.yaml", "micro_train_batch_size: 3\n")
    assert parsed("--config", file, "--train_batch_size=9")[1].train_batch_size == 9
    with pytest.raises(ConfigError, match="train_batch_size=8 is not a multiple of"):
        parsed("--config", file)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.yaml", None, "--config: cannot read {file}: No such file or directory"),
        ("run.txt", "seed: 1", "--config: expected a file named .yaml, .yml, .json, .toml, got {file}"),
        ("run.yaml", "seed: [1", "{file}: expected valid YAML, got: "),
        ("run.yaml", "seed: 1\nseed: 2", "{file}: duplicate key 'seed'"),
        ("run.toml", "seed = 1\nseed = 2", "{file}: expected valid TOML, got: duplicate key"),
        ("run.toml", "seed 1", "{file}: expected valid TOML, got: "),
        ("run.json", '{"seed": 1, "seed": 2}', "{file}: duplicate key 'seed'"),
        ("run.yaml", "engine.type: a\nengine: {type: b}", "{file}: duplicate key 'type'"),
        ("run.yaml", "engine_type: a\nengine: {type: b}", "{file}: duplicate key 'engine_type'"),
        ("run.yaml", "engine: vllm", "{file}: engine: expected a mapping of names to values, got str ('vllm')"),
        ("run.yaml", "engine: vllm\nengine.tp_size: 2", "{file}: 'engine.tp_size' and 'engine' are both given"),
        ("run.yaml", "- 1", "{file}: expected a mapping of setting names to values"),
        ("run.yaml", "sed: 1", "{file}: StrategyConfig: 'sed' is not a setting, got int (1). Did you mean 'seed'?"),
        ("run.yaml", "optimizer.lr: 1", "{file}: StrategyConfig: 'optimizer.lr' is not a setting"),
        ("run.yaml", "engine: {tp_sise: 2}", "{file}: StrategyConfig: 'engine_tp_sise' is not a setting. Did you mean 'engine_tp_size'?"),
        ("run.yaml", "seed: '7'\nzero_stage: 9", "seed: expected an integer >= 0 and < 4294967296, got str ('7') zero_stage: expected"),
        ("run.yaml", "extra_args: {step: 1}", "{file}: extra_args: 'step' is not an option of this script. Did you mean 'steps'?"),
        ("run.yaml", "extra_args: {zzz: 1}", "{file}: extra_args: 'zzz' is not an option of this script. Remove it"),
        ("run.yaml", "extra_args: 3\nengine: {eager: true}", "{file}: extra_args: expected a mapping of names to values, got int (3)"),
        ("run.yaml", "extra_args: {seed: 3}", "{file}: extra_args: 'seed' is a setting. Write it outside extra_args"),
        ("run.yaml", "engine: {eager: true}\nextra_args: {engine_eager: true}", "{file}: duplicate key 'engine_eager'"),
        ("run.yaml", "extra_args: {lora: 3}", "{file}: extra_args: lora: expected True or False, got int (3)"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_one_line_that_names_it(write, tmp_path, capsys, name, text, said):
    file = str(tmp_path / name) if text is None else write(name, text)
    assert said.format(file=file) in refused(capsys, "--config", file)


@pytest.mark.parametrize("argv", [["--config"], ["--config", "--seed=1"], ["--engine.eager"]])
def test_an_option_without_a_value_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(argv)
    assert f"argument {argv[0]}: expected one argument" in capsys.readouterr().err


def test_a_misspelled_option_of_engines_is_refused(capsys):
    assert "'engine_tp_sise' is not a setting. Did you mean 'engine_tp_size'?" in refused(capsys, "--engine.tp_sise=2")


def test_a_parser_that_would_ignore_files_refuses_them(capsys, write):
    file = write("run.yaml", "seed: 1\n")
    parent = StrategyConfig.add_arguments(argparse.ArgumentParser(add_help=False))
    for script, argv in [(argparse.ArgumentParser(parents=[parent]), ["--config", file]), (parser(), ["--conf", file])]:
        with pytest.raises(SystemExit) as ended:
            script.parse_args(argv)
        assert ended.value.code == 2 and "Write --config in full" in capsys.readouterr().err


def test_the_config_option_of_a_script_stays_its_own(write):
    script = argparse.ArgumentParser()
    script.add_argument("--config", type=int)
    assert StrategyConfig.add_arguments(script).parse_args(["--config", "3"]).config == 3


def test_subcommands_read_files(write):
    script = argparse.ArgumentParser()
    StrategyConfig.add_arguments(script.add_subparsers().add_parser("train"))
    assert script.parse_args(["train", "--config", write("run.yaml", "seed: 7\n")]).seed == 7


def test_words_after_two_dashes_are_left_alone(write):
    script = StrategyConfig.add_arguments(argparse.ArgumentParser())
    script.add_argument("rest", nargs="*")
    assert script.parse_args(["--", "--config", "x", "--engine.y"]).rest[-3:] == ["--config", "x", "--engine.y"]


def script(*options, **defaults):
    """A parser with settings, the options of a script, and the defaults that it sets."""
    own = StrategyConfig.add_arguments(argparse.ArgumentParser(prog="train.py"))
    for names, keywords in options:
        own.add_argument(*names, **keywords)
    own.set_defaults(**defaults)
    return own


def doubled(text):
    return 2 * int(text)


class Pairs(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        pairs = [values] if isinstance(values, str) else values
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(pair.split("=") for pair in pairs)})


FLAG = [(["--flag"], {"action": "store_true"}), (["--no-flag"], {"action": "store_false", "dest": "flag"})]
TAGS = [(["--tags"], {"action": "append"})]
VERBOSE = [(["-v"], {"action": "count", "default": 0})]
SOURCE = [(["source"], {}), (["--layers"], {"nargs": "*", "type": int})]


@pytest.mark.parametrize(
    ("options", "argv"),
    [
        (FLAG, ["--flag"]), (FLAG, ["--no-flag"]), (FLAG, []), (TAGS, ["--tags=a", "--tags=b"]), (TAGS, ["--tags=-x"]), (TAGS, []),
        (VERBOSE, ["-vv"]), (VERBOSE, []), (SOURCE, ["in", "--layers", "1", "2"]), (SOURCE, ["--layers=1", "in"]),
        ([(["source"], {"nargs": "?", "type": doubled, "default": "4"})], ["3"]),
        ([(["source"], {"nargs": "?", "type": doubled, "default": "4"})], []),
        ([(["sources"], {"nargs": "*"})], ["a", "b"]), ([(["sources"], {"nargs": "+", "action": "extend", "type": int})], ["1", "2"]),
        ([(["sources"], {"nargs": "*", "action": "extend"})], ["a", "b"]), ([(["sources"], {"nargs": "*", "action": "append"})], ["a"]),
        ([(["rest"], {"nargs": argparse.REMAINDER})], ["a", "--b"]), ([(["--box"], {"nargs": 2, "type": float})], ["--box", "1", "2.5"]),
        ([(["--boxes"], {"nargs": 2, "type": int, "action": "append"})], ["--boxes", "1", "2", "--boxes", "3", "4"]),
        ([(["--size"], {"type": doubled})], ["--size=4"]), ([(["--number"], {"default": 3})], []),
        ([(["--on"], {"type": lambda text: text == "yes"})], ["--on=yes"]), ([(["--map"], {"type": json.loads})], ['--map={"a": [1]}']),
        ([(["--names"], {"type": lambda text: text.split(",")})], ["--names=a,b"]), ([(["--pairs"], {"action": Pairs, "default": {}})], ["--pairs=a=1"]),
        ([(["--set"], {"action": "store_true", "default": argparse.SUPPRESS})], ["--set"]),
        ([(["--maybe"], {"nargs": "?", "const": "all"})], ["--maybe"]), ([(["--text"], {})], ["--text=-x --seed=3"]), ([(["--text"], {})], ["--text="]),
        ([(["--sft"], {"action": "append_const", "const": 1, "dest": "phases"}), (["--rl"], {"action": "append_const", "const": 2, "dest": "phases"})], ["--sft", "--rl"]),
    ],
)  # fmt: skip
def test_a_saved_config_repeats_the_run_of_any_script(tmp_path, options, argv):
    args = script(*options, debug=True).parse_args(argv)
    StrategyConfig.from_args(args).to_yaml(tmp_path / "run.yaml")
    again = script(*options, debug=True)
    assert vars(again.parse_args(["--config", str(tmp_path / "run.yaml")])) == vars(args)
    own = {action.dest: (action.default, action.required) for action in again._actions}
    assert own == {action.dest: (action.default, action.required) for action in script(*options, debug=True)._actions}


@pytest.mark.parametrize(
    ("options", "text", "argv", "expected"),
    [
        (FLAG, "flag: true", [], True), (FLAG, "flag: false", [], False), (FLAG, "flag: true", ["--no-flag"], False),
        (FLAG, "flag: false", ["--flag"], True), (TAGS, "tags: [a, b]", [], ["a", "b"]), (TAGS, "tags: [a, b]", ["--tags=c"], ["c"]),
        (VERBOSE, "v: 2", [], 2), (VERBOSE, "v: 2", ["-v"], 1), (SOURCE, "layers: [1, 2]", ["in"], "in"),
        (SOURCE, "{layers: [1, 2], source: a}", ["b"], "b"), (SOURCE, "{source: -x}", ["--layers", "1"], "-x"),
        ([(["source"], {"nargs": "?"})], "source: a", ["b"], "b"), ([(["source"], {"nargs": "*"})], "source: [a]", [], ["a"]),
        ([(["source"], {"nargs": "?", "type": int, "choices": [1, 2]})], "source: 2", [], 2),
        ([(["--pairs"], {"action": Pairs, "default": {}})], "pairs: a=1", ["--pairs=b=2"], {"a": "1", "b": "2"}),
        ([(["--pairs"], {"action": Pairs, "default": {}, "nargs": "+"})], "pairs: [a=1, b=2]", [], {"a": "1", "b": "2"}),
        ([(["--size"], {"type": doubled})], "size: '4'", [], 8), ([(["--ratio"], {"type": float})], "ratio: 3", [], 3.0),
        ([(["--text"], {})], "text: 3", [], "3"), ([(["--seed"], {"type": int, "required": True})], "seed: 3", [], 3),
    ],
)  # fmt: skip
def test_a_file_sets_an_option_of_any_kind_and_the_command_line_overrides_it(write, options, text, argv, expected):
    line = text if text == "seed: 3" else "extra_args: " + (text if text.startswith("{") else f"{{{text}}}")
    own = argparse.ArgumentParser()
    for names, keywords in options:
        own.add_argument(*names, **keywords)
    args = StrategyConfig.add_arguments(own).parse_args(["--config", write("run.yaml", line), *argv])
    dest = own._actions[1].dest
    assert getattr(args, dest) == expected and type(getattr(args, dest)) is type(expected)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("fast: true", "fast: false", False), ("ratio: 7.0", "ratio: null", None), ("layers: [1, 2]", "layers: [3]", [3])],
)
def test_a_later_file_overrides_an_earlier_one_with_a_default_too(write, first, second, expected):
    files = [write(f"{number}.yaml", f"extra_args: {{{text}}}") for number, text in enumerate((first, second))]
    args, _ = parsed("--config", files[0], "--config", files[1])
    assert getattr(args, first.partition(":")[0]) == expected


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        (FLAG, "flag: 1", "extra_args: flag: expected True or False, got int (1)"),
        (TAGS, "tags: a", "extra_args: argument --tags: expected a list, got str ('a')"),
        (VERBOSE, "v: true", "extra_args: argument -v: expected an integer >= 0, got bool (True)"),
        (SOURCE, "source: [a]", "extra_args: argument source: expected one value, got list (['a'])"),
        (SOURCE, "layers: [a]", "extra_args: argument --layers: invalid int value: 'a'"),
        (SOURCE, "layers: 1", "extra_args: argument --layers: expected a list, got int (1)"),
        ([(["--box"], {"nargs": 2})], "box: [a]", "argument --box: expected a list of 2, got list (['a'])"),
        ([(["--box"], {"nargs": "+"})], "box: []", "argument --box: expected a list of one or more values, got list ([])"),
        ([(["--size"], {"type": int, "default": 3})], "size: null", "argument --size: invalid int value: 'null'"),
        ([(["--text"], {"default": "a"})], "text: null", "argument --text: expected a value, got None"),
        ([(["--size"], {"type": int, "choices": [1, 2]})], "size: 3", "argument --size: invalid choice: 3"),
        ([(["--need"], {"required": True})], "need: null", "the following arguments are required: --need"),
        ([], "help: true", "extra_args: 'help' is not an option of this script"),
        ([], "config: a", "extra_args: 'config' is not an option of this script"),
    ],
)  # fmt: skip
def test_a_value_that_the_option_does_not_take_is_refused(write, capsys, options, text, said):
    with pytest.raises(SystemExit):
        script(*options).parse_args(["--config", write("run.yaml", f"extra_args: {{{text}}}")])
    assert said in capsys.readouterr().err


def test_options_that_exclude_each_other(write, capsys):
    def one_of(argv):
        own = script()
        group = own.add_mutually_exclusive_group(required=True)
        group.add_argument("--path")
        group.add_argument("--steps", type=int, default="5")
        return own.parse_args(argv)

    path, steps = (write(f"{text[0]}.yaml", f"extra_args: {{{text}}}") for text in ("path: a", "steps: 7"))
    assert (one_of(["--config", path]).path, one_of(["--config", path]).steps) == ("a", 5)
    for argv in (["--config", path, "--steps=7"], ["--config", path, "--config", steps]):
        assert (one_of(argv).path, one_of(argv).steps) == (None, 7)
    assert one_of(["--config", steps, "--path=b"]).steps == 5
    for text, said in [("{path: a, steps: 7}", "'path' and 'steps' exclude each other"), ("{path: null}", "required")]:
        with pytest.raises(SystemExit):
            one_of(["--config", write("run.yaml", f"extra_args: {text}")])
        assert said in capsys.readouterr().err


def test_a_file_sets_options_of_subcommands(write):
    own = script()
    train = own.add_subparsers(dest="command", required=True).add_parser("train")
    train.add_argument("--steps", type=int, required=True)
    train.add_argument("--tags", action="append", default=["x"])
    train.set_defaults(debug=True)
    file = write("run.yaml", "extra_args: {command: train, steps: 3, tags: [a], debug: false}")
    for argv, steps in (["train"], 3), (["train", "--steps=4"], 4), ([], 3):
        args = own.parse_args(["--config", file, *argv])
        assert (args.command, args.steps, args.tags, args.debug) == ("train", steps, ["a"], False)


def test_an_option_of_engines_replaces_the_one_value_that_it_names(write, capsys):
    file = write("run.yaml", "engine_arguments: {compilation_config: {level: 3, mode: 0}, seed: 1}\nengine.foo: 3\n")
    mode = "--engine.arguments.compilation_config.mode"
    for argv, expected in [
        ((mode, "1"), {"compilation_config": {"level": 3, "mode": 1}, "seed": 1}),
        ((mode, "1", mode.replace("mode", "x.y"), "2"), {"compilation_config": {"level": 3, "mode": 1, "x": {"y": 2}}, "seed": 1}),
        (("--engine.arguments.compilation_config", '{"a": 1}'), {"compilation_config": {"a": 1}, "seed": 1}),
    ]:  # fmt: skip
        assert parsed("--config", file, *argv)[1].extra_args["engine_arguments"] == expected
    assert script(engine_arguments={"a": 1}).parse_args(["--engine.arguments.b=2"]).engine_arguments == {"a": 1, "b": 2}
    earlier = argparse.Namespace(engine_arguments={"a": 1}, seed=1)
    again = script().parse_args(["--engine.arguments.b=2", "--config", write("seed.yaml", "seed: 2")], earlier)
    assert (again.engine_arguments, again.seed) == ({"a": 1, "b": 2}, 2)
    for argv in (["--config", file, "--engine.foo.bar=4"], ["--engine.foo=3", "--engine.foo.bar=4"]):
        assert "engine_foo: expected a mapping, to set 'bar' in it, got int (3). Remove one" in refused(capsys, *argv)
    assert "engine_type is a setting, not a mapping. Write --engine_type VALUE" in refused(capsys, "--engine.type.x=4")


def test_mappings_of_several_files_are_merged(write):
    first = write("1.yaml", "engine_arguments: {compilation_config: {level: 3}, seed: 1}\n")
    second = write("2.yaml", "engine_arguments: {compilation_config: {mode: 1}, seed: 2}\n")
    merged = {"compilation_config": {"level": 3, "mode": 1}, "seed": 2}
    assert parsed("--config", first, "--config", second)[1].extra_args["engine_arguments"] == merged


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '{"seed": 7}'), ("a.yaml", "seed: 7\n"), ("a.toml", "seed = 7\n")]
)
def test_files_with_a_byte_order_mark(write, name, text):
    assert StrategyConfig.from_file(write(name, "\ufeff" + text)).seed == 7


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b'{"seed" 1}', "expected valid JSON, got: Expecting ':' delimiter: line 1 column 9 (char 8). Correct it there"),
        ("a.yaml", b"\x80PNG", "expected text in UTF-8, got byte 0x80 at position 0. Save it as UTF-8"),
        ("a.json", b"[" * 100000, "expected settings, got values nested too deeply. Remove levels"),
        ("a.yaml", b"engine.arguments.x: 1\nengine: {arguments: {2: 3}}", "expected string keys, got int (2). Put it in quotes"),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_says_where(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as refusal:
        StrategyConfig.from_file(tmp_path / name)
    assert str(refusal.value) == f"{tmp_path / name}: {said}"


def test_the_help_shows_what_the_file_sets(write, capsys):
    own = script((["--steps"], {"type": int, "default": 3, "help": "%(default)s or %(default)d or %(default).1f"}))
    with pytest.raises(SystemExit) as ended:
        own.parse_args(["--config", write("run.yaml", "extra_args: {steps: 7}"), "--help"])
    assert ended.value.code == 0 and "7 or 7 or 7.0" in capsys.readouterr().out
