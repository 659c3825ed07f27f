"""The promises, on plain DistributedDataParallel; `nox -s peers` judges all of them on all libraries."""

import importlib
import json

import pages
import pytest

from lightrft.conformance.peers import Result, judge


def test_two_promises_on_plain_ddp(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pages.ROOT))
    results = judge("examples.peers.plain_ddp:PlainDDP", only=["accumulation", "two-backwards"])
    assert {result.promise: result.verdict for result in results} == {
        "accumulation": "holds",
        "two-backwards": "differs",
    }


@pytest.fixture
def errors(monkeypatch):
    monkeypatch.syspath_prepend(pages.ROOT)
    return importlib.import_module("examples.peers.results").errors


@pytest.fixture
def content():
    return json.loads((pages.ROOT / "docs/peers.json").read_text(encoding="utf-8"))


def test_the_published_results_are_complete_and_each_difference_has_an_entry(content, errors):
    assert not list(errors(content))


def test_each_published_script_shows_a_difference(content):
    for script, text in content["outputs"].items():
        (expected, wanted), (got, found) = (line.split(":", 1) for line in text.splitlines())
        assert (expected, got) == ("expected", "got"), script
        assert wanted.strip() != found.strip(), script


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content["columns"].pop(), "expected the columns"),
        (lambda content: content["outputs"].popitem(), "no output of"),
        (lambda content: content["notes"]["plain-ddp"].popitem(), "documented.toml has changed"),
        (lambda content: content["families"]["Updates"].pop(), "the promises are others"),
        (lambda content: content["columns"][0]["results"].pop(0), "accelerate-ddp is not judged by parity"),
        (lambda content: content["columns"][0]["results"][0].update(verdict="differs"), "differs in parity"),
        (
            lambda content: [
                result.update(verdict="holds") for each in content["columns"] for result in each["results"]
            ],
            "has an entry for plain.reduce-argument, but nothing differs there",
        ),
    ],
)
def test_incomplete_results_are_told(content, errors, damage, said):
    damage(content)
    assert any(said in told for told in errors(content))


def test_a_difference_of_another_library_without_a_script_is_told(content, errors, monkeypatch):
    results = importlib.import_module("examples.peers.results")
    notes = results.documented()
    del notes["accelerate-zero2"]["world-size"]["script"]
    monkeypatch.setattr(results, "documented", lambda: notes)
    told = [line for line in errors(content) if "script" in line]
    assert told == [
        "accelerate-zero2 differs in world-size: write a script that shows it, and name it in documented.toml"
    ]


def test_a_package_that_is_missing_is_no_difference(monkeypatch):
    monkeypatch.syspath_prepend(pages.ROOT)
    judging = importlib.import_module("examples.peers.judging")
    missing = "rank 0 raised PackageNotFoundError: No package metadata was found for transformers"
    result = Result(promise="parity", verdict="differs", detail=missing)
    monkeypatch.setattr(judging, "judge", lambda *_, on_result, **__: on_result(result))
    with pytest.raises(SystemExit, match=r"accelerate-ddp: parity was not judged: .*transformers"):
        judging.judged("accelerate-ddp", [])
