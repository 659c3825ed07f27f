"""The pages that are made from the code are up to date, and what they quote is what is there."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

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


def test_a_page_that_says_something_else_is_noticed(tmp_path: Path) -> None:
    module = build()
    for name, make in module.PAGES.items():
        (tmp_path / name).write_text(make(), encoding="utf-8")
    assert not module.outdated(tmp_path)
    (tmp_path / "contract.md").write_text("MUST not", encoding="utf-8")
    assert module.outdated(tmp_path) == ["contract.md"]


def test_the_tutorial_quotes_the_example_as_it_is() -> None:
    page = (ROOT / "docs/certify-your-own.md").read_text(encoding="utf-8")
    toml, code = re.findall(r"```toml\n(.*?)```", page, re.S)[0], re.findall(r"```python\n(.*?)```", page, re.S)[0]
    example = ROOT / "examples/ddp_strategy"
    assert (example / "pyproject.toml").read_text(encoding="utf-8") == toml
    assert (example / "ddp_strategy.py").read_text(encoding="utf-8").endswith(code)
