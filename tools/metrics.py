"""Sizes of the packages, read from their syntax trees: ``python tools/metrics.py`` prints them, and imports no package.

For each package: statements of its sources and of its tests, and lines of its sources that mention ``Any``. Docstrings,
overloads and aliases do not count as statements. Below the table: the longest inheritance chain of our own classes.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (*sorted((ROOT / "packages").iterdir()), ROOT / "conformance")
ANY = re.compile(r"\bAny\b")


@dataclass(frozen=True)
class Package:
    """The Python files of a package."""

    folder: Path

    @property
    def modules(self) -> dict[str, ast.Module]:
        """Syntax trees of the sources, by the names under which they are imported."""
        return {_module_name(path, self.folder / "src"): _parse(path) for path in _files(self.folder / "src")}

    @property
    def statements(self) -> int:
        """Statements of the sources."""
        return sum(map(count_statements, self.modules.values()))

    @property
    def test_statements(self) -> int:
        """Statements of the tests."""
        return sum(count_statements(_parse(path)) for path in _files(self.folder / "tests"))

    @property
    def any_lines(self) -> int:
        """Lines of the sources that mention ``Any``."""
        sources = (path.read_text("utf-8").splitlines() for path in _files(self.folder / "src"))
        return sum(bool(ANY.search(line)) for lines in sources for line in lines)


def count_statements(tree: ast.AST) -> int:
    """Statements in ``tree``, without docstrings, overloads and aliases."""
    children = [node for node in ast.iter_child_nodes(tree) if not _is_overload(node) and not _is_docstring(node)]
    if isinstance(tree, ast.Module | ast.ClassDef):
        children = [node for node in children if not _is_alias(node)]
    return sum(isinstance(node, ast.stmt) + count_statements(node) for node in children)


def longest_chain(modules: Mapping[str, ast.Module]) -> list[str]:
    """The longest chain of classes of ``modules``, each a base of the one before."""
    imported = {name: _imported_names(tree) for name, tree in modules.items()}

    def resolve(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """The class that ``name`` means in ``module``: the module that defines it, and its definition."""
        if module not in modules:
            return None
        for node in modules[module].body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
        first, _, attribute = name.partition(".")
        target = imported[module].get(first)
        if target is None:
            return None
        full = f"{target}.{attribute}".rstrip(".")
        return None if full == f"{module}.{name}" else resolve(*_split(full))

    @cache
    def chain(module: str, definition: ast.ClassDef) -> tuple[str, ...]:
        bases = (resolve(module, ast.unparse(base).partition("[")[0]) for base in definition.bases)
        return definition.name, *_longest(chain(*base) for base in bases if base)

    classes = ((name, node) for name, tree in modules.items() for node in tree.body if isinstance(node, ast.ClassDef))
    return list(_longest(chain(module, definition) for module, definition in classes))


def main() -> None:
    """Print the table, and the chain of the packages and of all."""
    packages = [Package(folder) for folder in PACKAGES]
    rows = [(each.folder.name, each.statements, each.test_statements, each.any_lines) for each in packages]
    print(f"{'package':24}{'statements':>12}{'of tests':>12}{'Any lines':>12}")
    for name, *counts in [*rows, _sum("packages/*", rows[:-1]), _sum("all", rows)]:
        print(f"{name:24}" + "".join(f"{count:12}" for count in counts))
    for name, chosen in (("packages/*", packages[:-1]), ("all", packages)):
        chain = longest_chain({module: tree for package in chosen for module, tree in package.modules.items()})
        print(f"longest inheritance chain, {name}: {len(chain)}: {' -> '.join(chain)}")


def _longest(chains: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return max([(), *chains], key=len)


def _sum(name: str, rows: Iterable[tuple[str, int, int, int]]) -> tuple[str, int, int, int]:
    _, statements, tests, any_lines = zip(*rows, strict=True)
    return name, sum(statements), sum(tests), sum(any_lines)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), path)


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _split(full: str) -> tuple[str, str]:
    module, _, name = full.rpartition(".")
    return module, name


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """What the imports at the top of a module mean, by the names they bind."""
    return dict(_bindings(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)))


def _bindings(nodes: Iterable[ast.Import | ast.ImportFrom]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        yield from ((alias.asname or alias.name, prefix + alias.name) for alias in node.names)


def _is_docstring(node: ast.AST) -> bool:
    """A string as a statement: of a module, class, function or attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_overload(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []
    return any(ast.unparse(decorator).endswith("overload") for decorator in decorators)


def _is_alias(node: ast.AST) -> bool:
    """A second name: ``type X = ...``, or an assignment of a name, or of a type made of names, to a name."""
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        return _names_a_type(node.value)
    return type(node).__name__ == "TypeAlias"


def _names_a_type(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr) and _names_a_type(node.left)
    if isinstance(node, ast.Subscript | ast.Attribute):
        return _names_a_type(node.value)
    return isinstance(node, ast.Name)


if __name__ == "__main__":
    main()
