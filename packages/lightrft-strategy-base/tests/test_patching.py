"""Patches of other libraries."""

from typing import Any

import pytest

from lightrft.config import EngineError, StrategyError
from lightrft.strategy.patching import Patch, Target, around, require

counter: dict[str, int] = {}


class Base:
    def __init__(self) -> None:
        self.limit = 1

    def add(self, first: int, second: int = 2) -> int:
        return first + second

    @classmethod
    def named(cls, name: str) -> tuple[str, ...]:
        return cls.__name__, name


class Derived(Base):
    pass


def patch(path: str, replacement: Any) -> Patch:
    return Patch(target=f"{__name__}:{path}", replacement=replacement, why="", upstream="", versions="1 to 2", until="")


def test_a_module_attribute_is_replaced_and_restored() -> None:
    undo = patch("counter", lambda counter: {**counter, "tp": 1}).apply()
    assert counter == {"tp": 1}
    undo()
    assert counter == {}


def test_an_inherited_class_method_is_replaced_on_its_subclass_alone() -> None:
    undo = patch("Derived.named", around(lambda original, cls, name: (*original(cls, name), "new"))).apply()
    assert Derived.named("a") == ("Derived", "a", "new")
    assert Base.named("a") == ("Base", "a")
    undo()
    assert "named" not in vars(Derived)
    assert Derived.named("a") == ("Derived", "a")


def test_a_patch_of_one_object_leaves_others() -> None:
    patched, other = Base(), Base()
    undo = patch("Base.add", around(lambda original, *args: -original(*args))).apply(patched)
    assert (patched.add(1), other.add(1)) == (-3, 3)
    undo()
    assert patched.add(1) == 3
    assert vars(patched) == {"limit": 1}


def test_an_attribute_of_objects_is_found_by_its_assignment() -> None:
    assert patch("Derived.limit", lambda limit: limit + 1).missing() is None
    assert Target(target=f"{__name__}:Derived.first").missing() is not None


@pytest.mark.parametrize("path", ["absent", "Absent.add", "Base.absent"])
def test_a_patch_without_its_target_raises(path: str) -> None:
    with pytest.raises(StrategyError, match=f"{path.partition('.')[0]}.*does not exist.*1 to 2"):
        patch(path, around(lambda original: None)).apply()


def test_a_patch_of_an_object_without_the_attribute_raises() -> None:
    with pytest.raises(StrategyError, match="limit does not exist"):
        patch("Base.limit", lambda limit: 2).apply(object())


def test_require_names_library_version_lack_and_remedy() -> None:
    targets = [
        Target(target=f"{__name__}:Base.add", parameters=("first", "third")),
        Target(target=f"{__name__}:counters"),
        Target(target="absent_library:name"),
    ]
    with pytest.raises(EngineError) as raised:
        require("engine 'x'", "pytest", ">=1", targets, EngineError)
    for words in (
        "engine 'x' expected pytest>=1",
        f"got pytest {pytest.__version__}",
        "Base.add has no parameter third",
        "counters does not exist",
        "No module named 'absent_library'",
        "pip install --force-reinstall 'pytest>=1'",
        f"if {pytest.__version__} is in this range, use an earlier version",
    ):
        assert words in str(raised.value)


def takes_more(first: int, **more: int) -> None: ...


def passes_on(*args: int, **more: int) -> None: ...


def test_a_parameter_that_further_keywords_would_swallow_is_missing() -> None:
    lacking = Target(target=f"{__name__}:takes_more", parameters=("first", "third")).missing()
    assert lacking is not None and lacking.endswith("takes_more has no parameter third")
    assert Target(target=f"{__name__}:passes_on", parameters=("third",)).missing() is None


def test_require_takes_a_library_that_has_all() -> None:
    require("engine 'x'", "pytest", ">=1", [Target(target=f"{__name__}:Base.add", parameters=("first",))])
