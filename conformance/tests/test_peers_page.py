"""The page of peers from results, some of which are missing."""

from typing import Any

from lightrft.conformance.peers.page import peers_page


def result(promise: str, verdict: str, detail: str = "", link: str = "") -> dict[str, str]:
    return {"promise": promise, "verdict": verdict, "detail": detail, "link": link}


def page(**columns: list[dict[str, str]]) -> str:
    results: dict[str, Any] = {
        "versions": {"torch": "2.13.0"},
        "families": {"Updates": [{"id": "parity", "text": "Parity."}, {"id": "nan", "text": "NaN."}]},
        "columns": [
            {"name": name, "library": name, "strategy": "DDP", "world": 2, "results": found}
            for name, found in columns.items()
        ],
        "notes": {"second": {"nan": {"link": "https://example.org/nan", "note": "A choice."}}},
        "outputs": {},
    }
    return peers_page(results, lambda table, name, original: original)


COMPLETE = [result("parity", "holds"), result("nan", "differs", "rank 0: nan")]


def test_a_promise_without_a_result_is_not_judged_and_the_page_says_so() -> None:
    text = page(first=COMPLETE, second=[result("nan", "not judged", "no NaN was made")])
    assert "| Parity. | holds | not judged |" in text
    assert "This page is not complete. Not judged:\n\n- second DDP: parity, nan (`no NaN was made`)\n" in text
    assert "## What holds in all of them\n\n\n## Promises" in text


def test_a_complete_page_tells_documented_differences_from_others() -> None:
    text = page(first=COMPLETE, second=COMPLETE)
    assert "not judged" not in text
    assert "not complete" not in text
    assert "| NaN. | [differs](#nan) | [differs, documented](#nan) |" in text
    assert "- second DDP: `rank 0: nan`. A choice. ([documented](https://example.org/nan))" in text


def test_what_takes_several_ranks_is_not_needed_from_one_process() -> None:
    text = page(first=COMPLETE, second=[result("parity", "not offered", "it is one process"), COMPLETE[1]])
    assert "| Parity. | holds | one process |" in text
    assert "## What holds in all of them\n\n- Parity.\n" in text
