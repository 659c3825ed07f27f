"""The pages that are made from the code are up to date, and what they quote is what is there."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lightrft.config import StrategyConfig
from lightrft.conformance.certificates.certificate import Certificate

ROOT = Path(__file__).parents[2]


def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_made_from_the_code_are_up_to_date() -> None:
    outdated = build().outdated(ROOT / "docs")
    assert not outdated, "run python docs/build.py"


def test_an_outdated_page_is_noticed(tmp_path: Path) -> None:
    module = build()
    folder = tmp_path / "docs"
    for name, make in module.pages(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(make(), encoding="utf-8")
    assert not module.outdated(folder)
    (folder / "contract.md").write_text("MUST not", encoding="utf-8")
    assert module.outdated(folder) == ["contract.md"]


def test_the_tutorial_quotes_the_example_as_it_is() -> None:
    page = (ROOT / "docs/certify-your-own.md").read_text(encoding="utf-8")
    toml, code = re.findall(r"```toml\n(.*?)```", page, re.S)[0], re.findall(r"```python\n(.*?)```", page, re.S)[0]
    example = ROOT / "examples/ddp_strategy"
    assert (example / "pyproject.toml").read_text(encoding="utf-8") == toml
    assert (example / "ddp_strategy.py").read_text(encoding="utf-8").endswith(code)


def test_the_file_of_settings_that_the_page_shows_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.S)[0], encoding="utf-8")
    config = StrategyConfig.from_file(tmp_path / "run.yaml")
    assert (config.engine_tp_size, config.get_extra_arg("engine_arguments")) == (2, {"block_size": 16})


def test_readmes_show_the_badge_of_each_certificate() -> None:
    module = build()
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")]
    run = {
        "world_size": 1,
        "device": "cpu",
        "profile": "ci",
        "seed": 0,
        "selected": [],
        "unjudged": "",
        "reproduce": "run",
    }
    machine = dict.fromkeys(("date", "python", "platform", "processors", "gpus", "torch", "hypothesis"), "1")
    certificate = Certificate.model_validate(
        {
            "verdict": "certified", "headline": "Certified: world size 1", "subject": {"name": "mine", "settings": {}, "digest": "sha256:0123456789abcdef"},
            "suite": {"version": "1", "digest": "", "contract": "1"}, "runs": [{**run, "environment": machine}], "clauses": [],
        }
    )  # fmt: skip
    for text, words in zip(texts, module.TEXTS.values(), strict=True):
        shown = module.with_badges(text, {"mine": certificate}, words)
        badge = (
            "[![mine](docs/certificates/mine.svg)](docs/certificates/mine.md)\n\n> mine: Certified: world size 1.\n> "
        )
        assert badge in shown
        assert "`0123456789ab…`" in shown and "`lightrft-conformance verify docs/certificates/mine.json`" in shown
        assert module.with_badges(shown, {"mine": certificate}, words) == shown
        assert "mine" not in module.with_badges(shown, {}, words).partition("<!-- end")[0]
        assert module.with_badges("no markers", {"mine": certificate}, words) == "no markers"
        for marker in ("<!-- certificates: written by docs/build.py -->\n", "<!-- end of certificates -->"):
            with pytest.raises(ValueError, match="both lines"):
                module.with_badges(text.replace(marker, ""), {"mine": certificate}, words)
    assert "Holds only" not in module.with_badges(texts[1], {"mine": certificate}, module.TEXTS[".zh"])


def test_the_tables_of_benchmarks_show_ratios_with_their_goals() -> None:
    module = build()
    rows = [
        {"benchmark": "step.fake", "case": "update", "what": "bare", "unit": "ms", "goal": "", "value": 21.0, "low": 20.0, "high": 22.0},
        {"benchmark": "step.fake", "case": "update", "what": "Fabric / bare", "unit": "", "goal": "", "value": 1.2, "low": 1.1, "high": 1.3},
        {"benchmark": "step.fake", "case": "update", "what": "ours / bare", "unit": "", "goal": "<= 1.01", "value": 1.02, "low": 1.01, "high": 1.03},
        {"benchmark": "planning", "case": "plan", "what": "time", "unit": "s", "goal": "<= 0.3", "value": 0.2, "low": 0.1, "high": 0.3},
        {"benchmark": "planning", "case": "plan", "what": "micro-batches", "unit": "", "goal": "", "value": 7, "low": 7, "high": 7},
    ]  # fmt: skip
    runs = [{"machine": ["Python 3", "two cores"], "rows": rows[:3]}, {"machine": ["one core"], "rows": rows[3:]}]
    page = "# Page\n<!-- benchmarks: written by docs/build.py -->\n<!-- end of benchmarks -->\n"
    shown = module.with_benchmarks(page, runs, module.TEXTS[""])
    assert "| update | bare, 21 ms | Fabric 1.200; ours 1.020 (1.010 to 1.030) | <= 1.01: **missed** |" in shown
    assert "| plan |  | time 0.2 s (0.1 to 0.3) | <= 0.3: met |" in shown
    assert "- two cores; Python 3\n- one core\n" in shown and "micro-batches 7" not in shown
    assert module.with_benchmarks(shown, runs, module.TEXTS[""]) == shown


def test_no_adapter_of_a_peer_is_longer_than_the_page_of_peers_says() -> None:
    (limit,) = re.findall(r"an adapter of at most (\d+) lines", (ROOT / "docs/peers.md").read_text(encoding="utf-8"))
    (translated,) = re.findall(r"不超过 (\d+) 行的适配器", (ROOT / "docs/peers.zh.md").read_text(encoding="utf-8"))
    lengths = [len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "examples/peers").glob("*.py")]
    assert limit == translated and 0 < max(lengths) <= int(limit)
