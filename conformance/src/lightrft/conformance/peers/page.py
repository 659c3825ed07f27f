"""The page docs/peers.md from the results of examples/peers/run.py, in any language."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Texts = Callable[[str, str, str], str]
"""A text in the language of the page, by table, name and English original."""

HEADER = """\
# Peers

Accelerate, Lightning Fabric, plain PyTorch and this project's layer, judged promise by promise. The promises are taken from
[the contract](contract.md), and worded for any training library. `nox -s peers` judges all of them again, runs the scripts below,
and writes this page.

Each library is judged through an adapter of at most 150 lines, in [examples/peers](../examples/peers), that uses the library as its
documentation shows, and works around nothing. A promise compares what the ranks did with plain PyTorch in one process, never with
this layer. The promises are judged one by one, so that one missing call does not hide the rest.

There are four verdicts: *holds*; *differs, documented*; *differs*, if we found no documentation of it; and *not offered*, if the
library leaves it to the script. Much of what differs is a choice: a library that leaves more to the script can do less behind its
back. The promises are those of this project, so its own columns show that it keeps them, not that the others fail.
"""
SETTINGS = """\
Versions: {versions}. Settings: fp32, on CPUs with gloo, 2 ranks; otherwise defaults. One process: {single}.
Accelerate ignores its FSDP2 plugin on CPUs. Nothing here was run on GPUs.
"""
ALL_HOLD = "What holds in all of them"
PROMISES = "Promises"
DIFFERENCES = "Differences"
DIFFERENCES_INTRODUCTION = """\
What was found for each promise, and scripts of at most 30 lines that show it without this project. The session runs them;
below each is what it printed.
"""
NOT_JUDGED = """\
This page is not complete. Not judged:
"""
OTHERS = "Other differences"
OTHERS_INTRODUCTION = """\
Behaviour that no promise covers, but that a script may encounter.
"""
WORDS = {
    "promise": "promise",
    "holds": "holds",
    "documented": "differs, documented",
    "undocumented": "differs",
    "not offered": "not offered",
    "one process": "one process",
    "not judged": "not judged",
    "documentation": "documented",
    "issue": "issue",
    "no documentation": "no documentation found",
}
FOLDER = "../examples/peers/differences"


def peers_page(results: Mapping[str, Any], texts: Texts, note: str = "note") -> str:
    """Render the page.

    Args:
        results: Content of docs/peers.json.
        texts: Translates.
        note: The key of the notes in the language of the page.
    """
    return "\n".join(_Page(results, texts, note).lines()) + "\n"


class _Page:
    def __init__(self, results: Mapping[str, Any], texts: Texts, note: str) -> None:
        self.results, self.texts, self.note_key = results, texts, note
        self.words = {name: texts("peers", name, word) for name, word in WORDS.items()}
        self.columns = results["columns"]
        self.promises = [promise for family in results["families"].values() for promise in family]
        self.found = {
            column["name"]: {result["promise"]: result for result in column["results"]} for column in self.columns
        }

    def text(self, name: str, original: str) -> str:
        return self.texts("peers", name, original).strip()

    def promise(self, promise: Mapping[str, str]) -> str:
        return self.texts("promises", promise["id"], promise["text"])

    def title(self, column: Mapping[str, Any]) -> str:
        return f"{column['library']} {column['strategy']}"

    def note(self, column: str, subject: str) -> Mapping[str, str]:
        note: Mapping[str, str] = self.results["notes"].get(column, {}).get(subject, {})
        return note

    def verdict(self, column: str, promise: str) -> str:
        """A key of `WORDS`."""
        result = self.found[column].get(promise, {"verdict": "not judged"})
        verdict: str = result["verdict"]
        if verdict == "not offered" and not result["link"]:
            return "one process"
        if verdict != "differs":
            return verdict
        return "documented" if self.note(column, promise).get("link") else "undocumented"

    def lines(self) -> Iterator[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.results["versions"].items())
        single = ", ".join(self.title(column) for column in self.columns if column["world"] == 1)
        yield self.text("header", HEADER)
        yield ""
        yield self.text("settings", SETTINGS).format(versions=versions, single=single)
        yield ""
        yield from self.counts()
        yield from self.not_judged()
        yield from self.held_by_all()
        yield from self.table()
        yield from self.differences()
        yield from self.others()

    def counts(self) -> Iterator[str]:
        """How many promises have which verdict."""
        counts = {
            self.title(column): Counter(self.verdict(column["name"], promise["id"]) for promise in self.promises)
            for column in self.columns
        }
        kinds = ["holds", "documented", "undocumented", "not offered"]
        kinds += [kind for kind in ("one process", "not judged") if any(count[kind] for count in counts.values())]
        yield _row("", *(self.words[kind] for kind in kinds))
        yield "|---|" + "---:|" * len(kinds)
        for title, count in counts.items():
            yield _row(title, *(str(count[kind]) for kind in kinds))

    def not_judged(self) -> Iterator[str]:
        """A line for each column of which promises were not judged, with the reasons that are known."""
        items = []
        for column in self.columns:
            reasons = {
                promise["id"]: self.found[column["name"]].get(promise["id"], {}).get("detail", "")
                for promise in self.promises
                if self.verdict(column["name"], promise["id"]) == "not judged"
            }
            shown = [f"{name} (`{_shortened(reason)}`)" if reason else name for name, reason in reasons.items()]
            items += [f"- {self.title(column)}: {', '.join(shown)}"] if shown else []
        if items:
            yield from ("", self.text("not-judged", NOT_JUDGED), "", *items)

    def held_by_all(self) -> Iterator[str]:
        """The promises that every library keeps, if it was judged on enough ranks."""
        yield from ("", f"## {self.text('all-hold', ALL_HOLD)}", "")
        for promise in self.promises:
            if {self.verdict(column["name"], promise["id"]) for column in self.columns} <= {"holds", "one process"}:
                yield f"- {self.promise(promise)}"

    def table(self) -> Iterator[str]:
        yield from ("", f"## {self.text('promises', PROMISES)}")
        for title, promises in self.results["families"].items():
            yield from ("", f"### {self.text(f'family-{title}', title)}", "")
            yield _row(self.words["promise"], *(self.title(column) for column in self.columns))
            yield "|" + "---|" * (len(self.columns) + 1)
            for promise in promises:
                cells = [self.cell(column["name"], promise["id"]) for column in self.columns]
                yield _row(self.promise(promise), *cells)

    def cell(self, column: str, promise: str) -> str:
        kind = self.verdict(column, promise)
        targets = {"documented": f"#{promise}", "undocumented": f"#{promise}"}
        if kind == "not offered":
            targets[kind] = self.found[column][promise]["link"]
        return f"[{self.words[kind]}]({targets[kind]})" if kind in targets else self.words[kind]

    def differences(self) -> Iterator[str]:
        """A section for each promise that some library does not keep."""
        yield from ("", f"## {self.text('differences', DIFFERENCES)}", "")
        yield self.text("differences-introduction", DIFFERENCES_INTRODUCTION)
        for promise in self.promises:
            names = [column["name"] for column in self.columns]
            differing = [name for name in names if self.verdict(name, promise["id"]) in ("documented", "undocumented")]
            if differing:
                yield from ("", f"### {promise['id']}", "", self.promise(promise), "")
                yield from self.items(promise["id"], differing)

    def items(self, subject: str, columns: list[str]) -> Iterator[str]:
        """An item for each column, and then the scripts with what they printed."""
        scripts: dict[str, None] = {}
        for column in self.columns:
            if column["name"] in columns:
                note = self.note(column["name"], subject)
                scripts |= {note["script"]: None} if "script" in note else {}
                yield f"- {self.item(column, subject, note)}"
        for script in scripts:
            yield from ("", f"[{script}]({FOLDER}/{script}):", "", "```text")
            yield from self.results["outputs"].get(script, "").splitlines()
            yield "```"

    def item(self, column: Mapping[str, Any], subject: str, note: Mapping[str, str]) -> str:
        detail = self.found[column["name"]].get(subject, {}).get("detail", "")
        parts = [f"`{_shortened(detail)}`."] if detail else []
        if "note" in note:
            parts.append(note.get(self.note_key, note["note"]))
        links = (
            [f"[{self.words['documentation']}]({note['link']})"]
            if note.get("link")
            else [self.words["no documentation"]]
        )
        links += [f"[{self.words['issue']}]({note['issue']})"] if note.get("issue") else []
        return f"{self.title(column)}: {' '.join(parts)} ({', '.join(links)})".replace(":  (", " (")

    def others(self) -> Iterator[str]:
        """Sections for the scripts that show behaviour that no promise covers."""
        known = {promise["id"] for promise in self.promises}
        subjects: dict[str, list[str]] = {}
        for column, notes in self.results["notes"].items():
            for subject in notes:
                if subject not in known:
                    subjects.setdefault(subject, []).append(column)
        if not subjects:
            return
        yield from ("", f"## {self.text('others', OTHERS)}", "", self.text("others-introduction", OTHERS_INTRODUCTION))
        for subject, columns in subjects.items():
            yield from ("", f"### {subject}", "")
            yield from self.items(subject, columns)


def _shortened(detail: str) -> str:
    """The first line of a message, without characters that end a code span."""
    line = detail.splitlines()[0].replace("`", "'")
    return line if len(line) <= 200 else f"{line[:200]}…"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
