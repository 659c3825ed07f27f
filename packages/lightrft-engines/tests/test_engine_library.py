"""A library that is missing, or lacks something, is refused with what was expected, what was found and a remedy."""

import importlib

import pytest
import torch

from lightrft.config import BackendNotInstalledError, EngineError
from lightrft.engines.engine_library import EngineLibrary
from lightrft.strategy.patching import Target

TORCH = EngineLibrary(engine="sample", distributions=("no-such-distribution", "torch"), supported=">=1,<3")


def test_a_library_with_all_targets_is_accepted():
    TORCH.require([Target(target="torch:sum", parameters=()), Target(target="torch.nn:Module.forward")])


def test_a_missing_target_is_named_with_version_and_remedy():
    with pytest.raises(EngineError) as raised:
        TORCH.require([Target(target="torch:no_such_function")])
    for words in (
        "engine 'sample' expected torch>=1,<3",
        f"got torch {torch.__version__}",
        "torch.no_such_function does not exist",
        "pip install --force-reinstall 'torch>=1,<3'",
    ):
        assert words in str(raised.value)


def test_a_library_that_cannot_be_imported_is_named_with_the_reason():
    words = r"cannot import torch 2\..*: .*no_such_module.*separate environment"
    with pytest.raises(BackendNotInstalledError, match=words), TORCH.importing():
        importlib.import_module("no_such_module")


@pytest.mark.parametrize("targets", [[], [Target(target="torch:no_such_function")]])
def test_a_library_that_is_not_installed_says_how_to_install_it(targets):
    absent = EngineLibrary(engine="sample", distributions=("no-such-distribution",), supported=">=1,<3")
    with pytest.raises(BackendNotInstalledError, match=r"no-such-distribution >=1,<3.*lightrft-engines\[sample\]"):
        absent.require(targets)
