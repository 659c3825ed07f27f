"""Each wheel by itself: its contents, and its behaviour in an environment with nothing but its dependencies."""

import ast
import email
import json
import re
import sys
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"strategy": "lightrft-strategy-base"}
"""Distributions whose names differ from those of their subpackages."""

MODULES = {"PIL": ["pillow"]}
"""Distributions of modules that only extras bring, where the names differ."""

IMPORT_ALL = """
import importlib, json, sys
from importlib.metadata import distribution
modules, missing = {}, {}
for name in sys.argv[2:]:
    try:
        modules[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        missing[name] = error.name.partition(".")[0]
for point in distribution(sys.argv[1]).entry_points:
    if point.module not in missing:
        point.load()
print(json.dumps({"prefix": sys.prefix, "modules": modules, "missing": missing}))
"""
PROVIDERS = (
    "import json; from importlib.metadata import packages_distributions; print(json.dumps(packages_distributions()))"
)
ASK_FOR_FSDP = """
from lightrft.config import BackendNotInstalledError
from lightrft.strategy import get_strategy
try:
    get_strategy({"fsdp": True})
except BackendNotInstalledError as error:
    print(error)
"""
LOADED = "import sys, {module}; print(*sorted({{'deepspeed', 'numpy', 'sglang', 'torch', 'transformers', 'vllm'}} & set(sys.modules)))"


def test_all_modules_import(installed):
    name = Requirement(installed.requirement).name
    outcome = json.loads(installed.run(IMPORT_ALL, name, *installed.modules()))
    assert outcome["modules"]
    assert all(Path(path).is_relative_to(outcome["prefix"]) for path in outcome["modules"].values())
    assert set(outcome["missing"].values()) <= _of_other_extras(installed), outcome["missing"]


def test_imports_only_declared_dependencies(package):
    declared = {canonicalize_name(requirement.name) for requirement in _requirements(package)} | {package.requirement}
    providers = json.loads(package.run(PROVIDERS))
    assert not {
        f"{module} imports {imported}"
        for module, imported in _imports(package)
        if not declared & set(map(canonicalize_name, _distributions(imported, providers)))
        and imported.partition(".")[0] not in sys.stdlib_module_names
    }


def test_is_one_typed_subpackage_of_the_namespace(package):
    parts = {path.split("/")[1] for path in package.files() if path.startswith("lightrft/")}
    assert len(parts) == 1, f"expected one subpackage, and no lightrft/__init__.py; got {parts}"
    assert f"lightrft/{parts.pop()}/py.typed" in package.files()


def test_has_license_and_description(package):
    metadata = _metadata(package)
    (license_text,) = (text for path, text in package.files().items() if path.endswith("/licenses/LICENSE"))
    assert license_text == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert len(str(metadata.get_payload()).splitlines()) > 5, "the README describes the package"


def test_readme_examples_run(complete):
    examples = re.findall(r"```python\n(.*?)```", (complete.sources / "README.md").read_text("utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        complete.run(example)


def test_metadata_has_no_pins(package):
    assert not [str(each) for each in _requirements(package) if any(bound.operator == "==" for bound in each.specifier)]


def test_changelog_begins_with_this_version(package):
    headings = [
        line for line in (package.sources / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## ")
    ]
    assert headings[0].split()[1] == _metadata(package)["Version"]


def test_config_imports_no_torch(alone):
    assert alone("lightrft-strategy-base").run(LOADED.format(module="lightrft.config")).split() == []


@pytest.mark.parametrize("requirement", ["lightrft-deepspeed", "lightrft-engines[transformers]"])
def test_strategy_imports_no_installed_backend(alone, requirement):
    assert set(alone(requirement).run(LOADED.format(module="lightrft.strategy")).split()) <= {"numpy", "torch"}


def test_error_for_a_missing_strategy_names_the_install_command(alone):
    assert "pip install 'lightrft-fsdp'" in alone("lightrft-strategy-base").run(ASK_FOR_FSDP)


def _imports(package) -> Iterator[tuple[str, str]]:
    """All imports in the wheel: the importing module and the imported one."""
    for module, source in package.modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                assert node.module != "lightrft", f"{module}: from lightrft import ..."
                yield module, str(node.module)


def _distributions(imported: str, providers: Mapping[str, list[str]]) -> list[str]:
    """Distributions that may provide a module."""
    top, _, inner = imported.partition(".")
    if top == "lightrft":
        part = inner.partition(".")[0]
        return [DISTRIBUTIONS.get(part, f"lightrft-{part}")]
    return providers.get(top) or MODULES.get(top, [top])


def _metadata(package) -> Message:
    (text,) = (text for path, text in package.files().items() if path.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(text)


def _requirements(package) -> list[Requirement]:
    return list(map(Requirement, _metadata(package).get_all("Requires-Dist", [])))


def _of_other_extras(installed) -> set[str]:
    """Dependencies that only extras bring which are not installed."""
    extras = Requirement(installed.requirement).extras or {""}
    optional = [each for each in _requirements(installed) if each.marker and "extra" in str(each.marker)]
    return {each.name for each in optional if not any(each.marker.evaluate({"extra": extra}) for extra in extras)}
