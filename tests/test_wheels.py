"""What each wheel promises by itself: read from the built wheel, and tried where it is alone with what it declares."""

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
LAYERS = [["config"], ["strategy"], ["deepspeed", "fsdp", "engines"], ["conformance"]]
"""Parts of the namespace: each imports from those before its own list, and from itself."""
DISTRIBUTIONS = {"strategy": "lightrft-strategy-base"}
"""Of the parts whose distribution is not called like them."""

MODULES = {"PIL": ["pillow"]}
"""Whose they are, of the modules that only an extra brings and whose name is another than their distribution's."""

IMPORT_ALL = """
import importlib, json, sys
from importlib.metadata import distribution
found, missing = {}, {}
for name in sys.argv[2:]:
    try:
        found[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        missing[name] = error.name.partition(".")[0]
for point in distribution(sys.argv[1]).entry_points:
    if point.module not in missing:
        point.load()
print(json.dumps({"prefix": sys.prefix, "found": found, "missing": missing}))
"""
PROVIDERS = "import json, importlib.metadata as it; print(json.dumps(it.packages_distributions()))"
ASK_FOR_FSDP = """
from lightrft.config import BackendNotInstalledError
from lightrft.strategy import get_strategy
try:
    get_strategy({"fsdp": True})
except BackendNotInstalledError as error:
    print(error)
"""
LOADED = "import sys, {module}; print(*sorted({{'deepspeed', 'numpy', 'sglang', 'torch', 'transformers', 'vllm'}} & set(sys.modules)))"


def test_all_of_it_imports_with_what_is_declared(installed):
    name = Requirement(installed.requirement).name
    outcome = json.loads(installed.run(IMPORT_ALL, name, *installed.modules()))
    assert outcome["found"]
    assert all(Path(path).is_relative_to(outcome["prefix"]) for path in outcome["found"].values())
    assert set(outcome["missing"].values()) <= _of_other_extras(installed), outcome["missing"]


def test_it_imports_only_what_is_declared(package):
    declared = {canonicalize_name(it.name) for it in _requirements(package)} | {package.requirement}
    providers = json.loads(package.run(PROVIDERS))
    assert not {
        f"{module} imports {imported}"
        for module, imported in _imports(package)
        if not declared & set(map(canonicalize_name, _distributions(imported, providers)))
        and imported.partition(".")[0] not in sys.stdlib_module_names
    }


def test_its_imports_go_one_way(package):
    ours = [(module, imported) for module, imported in _imports(package) if imported.startswith("lightrft.")]
    assert not [it for it in ours if _part(it[0]) != _part(it[1]) and _layer(it[0]) <= _layer(it[1])]


def test_it_adds_to_the_namespace_and_does_not_own_it(package):
    parts = {path.split("/")[1] for path in package.files() if path.startswith("lightrft/")}
    assert len(parts) == 1, f"one part of the namespace, and no lightrft/__init__.py: {parts}"
    assert f"lightrft/{parts.pop()}/py.typed" in package.files()


def test_it_carries_license_and_description(package):
    metadata = _metadata(package)
    (license_text,) = (text for path, text in package.files().items() if path.endswith("/licenses/LICENSE"))
    assert license_text == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert len(str(metadata.get_payload()).splitlines()) > 5, "the README says what the package is, and is not"


def test_its_readme_is_true(complete):
    (example,) = re.findall(r"```python\n(.*?)```", (complete.sources / "README.md").read_text("utf-8"), re.DOTALL)
    complete.run(example)


def test_its_metadata_has_ranges_and_no_pins(package):
    assert not [str(it) for it in _requirements(package) if any(bound.operator == "==" for bound in it.specifier)]


def test_its_changelog_begins_with_this_version(package):
    headings = [
        line for line in (package.sources / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## ")
    ]
    assert headings[0].split()[1] == _metadata(package)["Version"]


def test_settings_load_no_torch(alone):
    assert alone("lightrft-strategy-base").run(LOADED.format(module="lightrft.config")).split() == []


@pytest.mark.parametrize("requirement", ["lightrft-deepspeed", "lightrft-engines[transformers]"])
def test_the_base_loads_no_backend_that_is_there(alone, requirement):
    assert set(alone(requirement).run(LOADED.format(module="lightrft.strategy")).split()) <= {"numpy", "torch"}


def test_a_strategy_that_is_not_installed_is_an_error_with_the_command(alone):
    assert "pip install 'lightrft-fsdp'" in alone("lightrft-strategy-base").run(ASK_FOR_FSDP)


def _imports(package) -> Iterator[tuple[str, str]]:
    """Every import anywhere in the wheel: which module, and what it imports."""
    for module, source in package.modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                assert node.module != "lightrft", f"{module}: from lightrft import ..."
                yield module, str(node.module)


def _distributions(imported: str, providers: Mapping[str, list[str]]) -> list[str]:
    """Those that may provide a module."""
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
    """What may be missing: what only extras bring that are not installed here."""
    here = Requirement(installed.requirement).extras or {""}
    optional = [it for it in _requirements(installed) if it.marker and "extra" in str(it.marker)]
    return {it.name for it in optional if not any(it.marker.evaluate({"extra": extra}) for extra in here)}


def _part(module: str) -> str:
    return module.split(".")[1]


def _layer(module: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if _part(module) in parts)
