"""What docs/peers.json holds: the columns of the table, notes on differences, and what is missing or out of date in it."""

import tomllib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrft.conformance.peers.promises import by_family

RESULTS = Path(__file__).parents[2] / "docs/peers.json"
DIFFERENCES = Path(__file__).with_name("differences")

Notes = dict[str, dict[str, dict[str, str]]]
"""What is known about differences, by column, or by library, and subject."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table."""

    library: str
    strategy: str
    target: str
    world: int = 2


COLUMNS = {
    "accelerate-ddp": Column(
        library="Accelerate", strategy="DDP", target="examples.peers.accelerate_loops:AccelerateDDP"
    ),
    "accelerate-zero2": Column(
        library="Accelerate", strategy="ZeRO-2", target="examples.peers.accelerate_loops:AccelerateZero2"
    ),
    "fabric-ddp": Column(library="Fabric", strategy="DDP", target="examples.peers.fabric:FabricDDP"),
    "fabric-fsdp2": Column(library="Fabric", strategy="FSDP2", target="examples.peers.fabric:FabricFSDP2"),
    "plain-ddp": Column(library="PyTorch", strategy="DDP", target="examples.peers.plain_ddp:PlainDDP"),
    "plain-fsdp2": Column(library="PyTorch", strategy="FSDP2", target="examples.peers.plain_fsdp2:PlainFSDP2"),
    "ours-fake": Column(library="LightRFT", strategy="fake", target="examples.peers.ours:fake", world=1),
    "ours-fsdp": Column(library="LightRFT", strategy="fsdp", target="examples.peers.ours:fsdp"),
    "ours-zero2": Column(library="LightRFT", strategy="deepspeed, ZeRO-2", target="examples.peers.ours:zero2"),
}


def documented() -> Notes:
    """The content of documented.toml."""
    return tomllib.loads((DIFFERENCES / "documented.toml").read_text(encoding="utf-8"))


def notes_of(column: str, notes: Notes) -> dict[str, dict[str, str]]:
    """The notes on a column: those on its library, and its own."""
    return {**notes.get(column.partition("-")[0], {}), **notes.get(column, {})}


def scripts() -> list[str]:
    """The scripts that the notes name."""
    return sorted(
        {note["script"] for subjects in documented().values() for note in subjects.values() if "script" in note}
    )


def families() -> dict[str, list[dict[str, str]]]:
    """The promises, in the order of the table."""
    return {
        title: [{"id": promise.id, "text": promise.text} for promise in promises]
        for title, promises in by_family().items()
    }


def errors(content: Mapping[str, Any]) -> Iterator[str]:
    """What keeps the content of docs/peers.json from being published."""
    remedy = "run nox -s peers"
    if content["families"] != families():
        yield f"the promises are others than those that were judged; {remedy}"
    if [column["name"] for column in content["columns"]] != list(COLUMNS):
        yield f"expected the columns {', '.join(COLUMNS)}; {remedy}"
    if content["notes"] != {name: notes_of(name, documented()) for name in COLUMNS}:
        yield f"documented.toml has changed since; {remedy}"
    if missing := set(scripts()) - content["outputs"].keys():
        yield f"no output of {', '.join(sorted(missing))}; {remedy}"
    verdicts = {
        column["name"]: {result["promise"]: result["verdict"] for result in column["results"]}
        for column in content["columns"]
    }
    promises = {promise["id"] for family in families().values() for promise in family}
    for column, found in verdicts.items():
        if unjudged := promises - {promise for promise, verdict in found.items() if verdict != "not judged"}:
            yield f"{column} is not judged by {', '.join(sorted(unjudged))}; {remedy}"
    yield from _errors_of_notes(verdicts, promises)


def _errors_of_notes(verdicts: Mapping[str, Mapping[str, str]], promises: Set[str]) -> Iterator[str]:
    notes = documented()
    for column, found in verdicts.items():
        known = notes_of(column, notes)
        for promise in [promise for promise, verdict in found.items() if verdict == "differs"]:
            if promise not in known:
                yield f"{column} differs in {promise}: look for documentation, and add an entry to documented.toml"
            elif "script" not in known[promise] and not column.startswith("ours-"):
                yield f"{column} differs in {promise}: write a script that shows it, and name it in documented.toml"
    for name, subjects in notes.items():
        columns = [column for column in verdicts if column == name or column.startswith(f"{name}-")]
        for subject in promises & subjects.keys():
            if all(verdicts[column].get(subject) in ("holds", "not offered") for column in columns):
                yield f"documented.toml has an entry for {name}.{subject}, but nothing differs there: remove it"
