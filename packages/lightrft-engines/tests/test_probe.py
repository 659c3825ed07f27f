"""An engine that lacks a call is refused when it is built, with what was found and what is supported."""

import importlib

import pytest

from lightrft.config import BackendNotInstalledError, EngineError
from lightrft.engines.probe import Call, Library

TORCH = Library(engine="sample", distributions=("no-such-distribution", "torch"), supported="1 to 2")


class Sample:
    def plain(self, prompts, *, sampling): ...

    def anything(self, **options): ...


def test_calls_that_are_there_are_accepted():
    TORCH.require([Call(Sample, "plain", ("prompts", "sampling")), Call(Sample, "anything", ("whatever",))])


@pytest.mark.parametrize(
    ("call", "words"),
    [(Call(Sample, "gone"), "there is no Sample.gone"), (Call(Sample, "plain", ("images",)), "Sample.plain takes no images")],
)  # fmt: skip
def test_a_call_that_is_missing_is_named_with_the_versions(call, words):
    with pytest.raises(EngineError, match=rf"'sample' cannot drive torch 2\..*{words}.*1 to 2"):
        TORCH.require([call])


def test_a_library_that_cannot_be_imported_is_named_with_the_reason():
    words = r"torch 2\..* cannot be imported: .*no_such_module.*of its own"
    with pytest.raises(BackendNotInstalledError, match=words), TORCH.importing():
        importlib.import_module("no_such_module")


@pytest.mark.parametrize("calls", [[], [Call(Sample, "gone")]])
def test_a_library_that_is_not_there_says_how_to_install_it(calls):
    absent = Library(engine="sample", distributions=("no-such-distribution",), supported="1 to 2")
    with pytest.raises(BackendNotInstalledError, match=r"no-such-distribution.*1 to 2.*lightrft-engines\[sample\]"):
        absent.require(calls)
