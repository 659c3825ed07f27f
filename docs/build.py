"""Generate documentation pages from the code: ``python docs/build.py``. ``--check`` only reports outdated pages.

``contract.md`` is generated from the clauses of the conformance suite, ``settings.md`` from the schema of `StrategyConfig`; their
translations also from ``zh.toml``. The tables of ``performance.md`` come from what the benchmarks wrote to baseline.json. ``certificate.schema.json``, also in the package, comes from the model of certificates, and the
pages and badges of certificates from their JSON, which `nox -s certificates` writes.
"""

import argparse
import json
import sys
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightrft.config import StrategyConfig
from lightrft.conformance.certificates.certificate import Certificate, schema
from lightrft.conformance.certificates.formats import FORMATS, markdown_text
from lightrft.conformance.clause import Clause
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.families import by_family
from lightrft.conformance.peers.page import peers_page
from lightrft.conformance.saboteurs.corpus import saboteurs

INTRODUCTIONS = {
    "LIFE": "A strategy starts, notices lost ranks, and leaves the process as it found it.",
    "LOG": "Only rank 0 prints and writes, and each number has one meaning on every strategy.",
    "COLL": "`all_reduce` and `all_gather` exchange metrics and data between ranks.",
    "PREP": "`prepare` and related methods return models that compute and train as the original ones would.",
    "DATA": "`setup_dataloader` gives every rank its share of the samples, in an order that a resumed run continues.",
    "SP": "Several ranks share each sequence (`sp_size`), with the same results as one rank per sequence.",
    "OPT": "`backward` and `optimizer_step` make updates: accumulation, averaging, clipping, skips and schedules.",
    "NORM": "`backward(..., denominator=n)` averages over items, such as tokens, instead of micro-batches.",
    "BATCH": "`plan_micro_batches` divides sequences of different lengths by a budget of tokens.",
    "LOGP": "`token_log_probs` computes log-probabilities and entropies, also without holding the logits of the batch in memory.",
    "OFF": "Models and optimizer state move to host memory and back.",
    "CKPT": "`save_ckpt` and `load_ckpt` resume a run exactly, on any strategy; a checkpoint survives crashes.",
    "EXPORT": "`save_model` writes a model that transformers opens.",
    "ENG": "`setup_inference_engine` creates the engine, which can sleep and wake up.",
    "SYNC": "After `update_engine_weights`, the engine generates from the weights of the actor. After a failure, it refuses to generate.",
    "GEN": "`gather_and_generate` and `engine_generate_local` return the completions of each rank's prompts, sampled as requested.",
    "ALL": "The guarantees above hold in one program, in any order.",
}
"""A sentence about each family of clauses."""
CONTRACT_PAGE = """\
# The contract

This page lists what every LightRFT strategy guarantees, on any backend. `nox -s pages` generates it from the clauses that the
conformance suite executes.

MUST clauses decide the verdict; SHOULD clauses are only reported. *From* is the smallest world size at which a clause can fail,
with its other requirements. *Defects* is the number of deliberately broken strategies and engines in which the clause
is known to detect the defect. K is the number of micro-batches per update, the attribute `accumulated_gradient`. The
reference is a plain single-process implementation that shares no code with the strategies.
"""
SETTINGS_PAGE = """\
# Settings

This page lists the fields of `StrategyConfig`. `nox -s pages` generates it from the schema.

No setting is ignored silently: a setting that the chosen strategy does not support is an error, or a warning if
the settings come from a script's arguments (`StrategyConfig.from_args`). Settings of other backends are exempt.

Values are stored exactly or rejected. A float setting also accepts an integer, if a float holds it exactly.
"""
CERTIFICATES = (
    "Holds only for the code with the digest `{}…`, which may be older than yours: "
    "`lightrft-conformance verify docs/certificates/{}.json` compares them."
)
"""Below the headline of a certificate."""
BENCHMARKS = """\
`nox -s bench -- --save-baseline` writes these tables, `nox -s syncs -- --save-baseline` those rows that name vLLM or SGLang.
A figure is the median of the rounds. The quartiles follow in parentheses if the figure has a goal or is this layer's. A ratio of
times or of memory below 1 is better, one of speeds above 1. The runs:
"""
"""Above the tables of performance.md."""
BENCHMARK_GROUPS = {
    "step": "Updates",
    "collectives": "Collectives",
    "checkpoint": "Checkpoints",
    "memory": "Memory",
    "sync": "Weight syncs and generation",
    "log_probs": "Log-probabilities",
    "sequence_parallel": "Sequence parallelism",
    "planning": "Plans of micro-batches",
    "scale": "Work that grows with ranks",
    "conformance": "Certification",
    "imports": "Imports and commands",
}
"""Titles of the tables, by the first part of the benchmarks' names."""
OWNERS = {
    "strategy": "Read by the strategy",
    "engine": "Read by the rollout engine",
    "trainer": "Read by the trainer",
}
NOTES = {
    "trainer": "The strategy stores these in `strategy.config` and does not use them. `get_strategy` warns once of those that "
    "differ from their defaults.",
}
"""What a group of settings has in common."""

SETTINGS_FILES = """
## Files

Scripts whose options come from `StrategyConfig.add_arguments` read settings from files:

<!-- not run: train.py stands for a script of yours -->
```
python train.py --config run.yaml --seed 7
```

Defaults, including those of the script, come first, then the files, then the command line: options override files regardless
of their position, and a later `--config` overrides an earlier one. Mappings of several files, such as `arguments` below, are merged
name by name. `StrategyConfig.from_file` reads a file without a command line. The
[demo contains a file](../examples/rlvr_arithmetic/run.yaml) for transformers. A file for vLLM looks like this:

```yaml
# run.yaml
strategy: fsdp
actor_learning_rate: 1e-6

engine: # the settings and extra arguments of rollout engines, without engine_
  type: vllm
  tp_size: 2
  max_model_len: 2048
  arguments: # vLLM's own
    block_size: 16

extra_args: # options of the script
  steps: 100
```

```console
$ lightrft config check run.yaml
run.yaml is valid
```

- Files are YAML 1.2 (`.yaml`, `.yml`), TOML (`.toml`) or JSON (`.json`). TOML has no null: leave the setting out.
- `engine.tp_size: 2` means the same as the section `engine`, and as `engine_tp_size: 2`. On the command line, write
  `--engine.tp_size 2` or `--engine.arguments.block_size 16`, which replaces only the value that it names.
- `extra_args` may name every option and positional argument of the script, including required ones. A string is read as on the
  command line; any other value is stored unchanged, if the type and the choices of the option accept it. The command line
  replaces the value, even if the option may be repeated. If a script adds an option `--config` before it calls
  `add_arguments`, that option remains the script's.
- A file that cannot be read or parsed, a duplicate name, an unknown name and an invalid value are errors, each in one line with
  the file, the name, and the closest valid name. Conflicts between settings are checked with the command line.
- `strategy.config.summary()` is a table of the settings that differ from their defaults, for scripts to print. A file that
  `strategy.config.to_yaml` has written repeats the run with `--config`.
- `lightrft config show FILE` and `lightrft config check FILE` read files in the same way; see
  [the command line](command-line.md#configuration-files).
"""


class Texts:
    """The texts of the pages in one language. docs/LANGUAGE.toml has translations, each with the digest of its original.

    A text that has changed since it was translated stays in English.
    """

    def __init__(self, language: str) -> None:
        path = Path(__file__).with_name(f"{language}.toml")
        self._translations = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.missing: dict[str, str] = {}
        """Digests of the texts that were not translated, by name."""

    def __call__(self, table: str, name: str, original: str) -> str:
        """Return a text in this language, or as it is."""
        translation = self._translations.get(table, {}).get(name, {})
        if translation.get("of") == digest(original):
            return str(translation["text"])
        self.missing[f"{table}.{name}"] = digest(original)
        return original


def digest(text: str) -> str:
    """Identify a version of a text."""
    return f"{zlib.crc32(text.encode()):08x}"


def contract_page(texts: Texts) -> str:
    """Every clause, by family."""
    defects = Counter(saboteur.clause for saboteur in saboteurs())
    lines = [texts("pages", "contract", CONTRACT_PAGE).strip()]
    for title, members in by_family(CONTRACT, lambda clause: clause.id).items():
        family = members[0].family
        lines += [
            "",
            f"## {texts('families', family, title)}",
            "",
            texts("introductions", family, INTRODUCTIONS[family]),
            "",
            texts("pages", "contract-columns", "| id | level | from | guarantee | defects |"),
            "|---|---|---|---|---:|",
        ]
        lines += [_clause_row(clause, defects[clause.id], texts) for clause in members]
    return "\n".join(lines) + "\n"


def _clause_row(clause: Clause, defects: int, texts: Texts) -> str:
    needs = [f"world {clause.smallest_world}", *(["CUDA"] if clause.needs_cuda else [])]
    needs += [f"`{clause.capability}`"] if clause.capability else []
    guarantee = texts("clauses", clause.id, clause.text)
    return _row(clause.id, clause.level, ", ".join(needs), guarantee, str(defects or ""))


def settings_page(texts: Texts) -> str:
    """The page of settings, grouped by the component that reads them."""
    properties = StrategyConfig.json_schema()["properties"]
    lines = [texts("pages", "settings", SETTINGS_PAGE).strip()]
    lines += ["", texts("pages", "settings-files", SETTINGS_FILES).strip()]
    for owner, title in OWNERS.items():
        lines += ["", f"## {texts('owners', owner, title)}"]
        lines += ["", texts("notes", owner, NOTES[owner])] if owner in NOTES else []
        lines += ["", texts("pages", "settings-columns", "| setting | type | default | meaning |"), "|---|---|---|---|"]
        lines += [_setting_row(name, field, texts) for name, field in properties.items() if field.get("owner") == owner]
    return "\n".join(lines) + "\n"


def _setting_row(name: str, field: dict[str, Any], texts: Texts) -> str:
    meaning = texts("settings", name, field.get("description", "").replace("``", "`"))
    backend = texts("pages", "backend", " Only for `{}`.").format(field["backend"]) if "backend" in field else ""
    kind = _type_of(field, texts("pages", "or", " or "))
    return _row(f"`{name}`", kind, f"`{field.get('default')!r}`", meaning + backend)


def _type_of(field: dict[str, Any], separator: str) -> str:
    """Describe the type and the range of a field."""
    if "anyOf" in field:
        return separator.join(_type_of(option, separator) for option in field["anyOf"])
    if "enum" in field:
        return separator.join(f"`{value!r}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']!r}`"
    words = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "None", "array": "list"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    ranges = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([words.get(field.get("type", ""), field.get("type", "any")), ", ".join(ranges)]).strip()


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


TEXTS = {"": Texts("en"), ".zh": Texts("zh")}
"""The texts of each language, by the suffix of its pages."""


def certificates_page(certificates: dict[str, Certificate]) -> str:
    """The list of certificates."""
    lines = [
        "# Certificates",
        "",
        "This page lists the strategies and engines of this project that the [conformance suite](../certify-your-own.md) has judged.",
        "A certificate holds only for the code with its digests. Not every commit runs the suite again, so it may be for an older version of the code:",
        "`lightrft-conformance verify docs/certificates/*.json` tells which of them are for the installed code.",
        '`nox -s certificates` runs the suite again and writes this folder; `nox -s "certificates(fsdp)"` does so for one of them.',
        "",
        "| | verdict | certificate | digest of the suite | of the strategy, engine |",
        "|---|---|---|---|---|",
    ]
    for name, certificate in certificates.items():
        badge = f"![{_label(certificate)}]({name}.svg)"
        links = f"[page]({name}.md), [HTML]({name}.html), [JSON]({name}.json)"
        codes = [certificate.subject, *([certificate.subject.engine] if certificate.subject.engine else [])]
        digests = ", ".join(f"`{code.digest[7:19]}`" for code in codes)
        lines.append(
            _row(
                _label(certificate),
                f"{badge}<br>{markdown_text(certificate.headline)}",
                links,
                f"`{certificate.suite.digest[7:19]}`",
                digests,
            )
        )
    return "\n".join(lines) + "\n"


def _label(certificate: Certificate) -> str:
    return markdown_text(certificate.title).replace("[", "&#91;").replace("]", "&#93;")


def with_badges(text: str, certificates: dict[str, Certificate], texts: Texts) -> str:
    """``text`` of a README, with the badges of all certificates and the headline of one between its two markers.

    Raises:
        ValueError: One of the markers is missing, or the second comes first.
    """
    badges = [
        f"[![{_label(certificate)}](docs/certificates/{name}.svg)](docs/certificates/{name}.md)"
        for name, certificate in certificates.items()
    ]
    name = "fsdp" if "fsdp" in certificates else next(iter(certificates), None)
    shown = [markdown_text(words) for words in (certificates[name].title, certificates[name].headline)] if name else []
    validity = (
        texts("pages", "certificates", CERTIFICATES).format(certificates[name].subject.digest[7:19], name)
        if name
        else ""
    )
    headline = f"\n> {': '.join(shown)}.\n> {validity}\n" if name else ""
    return with_content(text, "certificates", "".join([*(f"{badge}\n" for badge in badges), headline]))


def with_content(text: str, name: str, content: str) -> str:
    """``text`` of a page, with ``content`` between its two markers of ``name``, if it has them.

    Raises:
        ValueError: One of the markers is missing, or the second comes first.
    """
    first, end = f"<!-- {name}: written by docs/build.py -->\n", f"<!-- end of {name} -->"
    head, marked, rest = text.partition(first)
    _, closed, tail = rest.partition(end)
    if not marked and end not in text:
        return text
    if not marked or not closed:
        raise ValueError(f"a page needs both lines, in this order: {first.strip()} and {end}. Restore the missing one")
    return "".join([head, first, content, end, tail])


def with_benchmarks(text: str, runs: list[dict[str, Any]], texts: Texts) -> str:
    """``text`` of the page on performance, with a table for each group of benchmarks between the markers."""
    lines = ["", *texts("pages", "benchmarks", BENCHMARKS).splitlines(), ""]
    lines += [f"- {'; '.join(reversed(run['machine']))}" for run in runs]
    figures = [row for run in runs for row in run["rows"]]
    for group, title in BENCHMARK_GROUPS.items():
        rows = [row for row in figures if row["benchmark"].partition(".")[0] == group]
        if rows:
            lines += ["", f"### {texts('benchmarks', group, title)}", ""]
            lines += [
                texts("pages", "benchmarks-columns", "| case | compared with | medians | goal |"),
                "|---|---|---|---|",
            ]
            lines += _benchmark_table(rows, texts)
    return with_content(text, "benchmarks", "\n".join([*lines, "", ""]))


def _benchmark_table(rows: list[dict[str, Any]], texts: Texts) -> list[str]:
    """A row for each case and reference; times alone are left out, where there are ratios."""
    times = {(row["case"], row["what"]): row["value"] for row in rows if row["unit"] == "ms"}
    cells: dict[tuple[str, str], list[str]] = {}
    goals: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        contender, slash, reference = row["what"].partition(" / ")
        group = row["benchmark"].partition(".")[0]
        if group == "memory" and not row["unit"]:  # some would be ratios to almost nothing
            continue
        if row["unit"] in ("ms", "") and not slash and not row["goal"] and group != "scale":
            continue
        key = (row["case"], reference if slash else "")
        digits = ".3g" if row["unit"] else ".3f"
        figure = f"{row['value']:{digits}} {row['unit']}".strip()
        ours = row["low"] < row["high"] and (bool(row["goal"]) or contender.startswith("ours"))
        spread = f" ({row['low']:{digits}} to {row['high']:{digits}})" if ours else ""
        cells.setdefault(key, []).append(f"{contender} {figure}{spread}")
        if row["goal"]:
            sign, bound = row["goal"].split()
            met = row["value"] >= float(bound) if sign == ">=" else row["value"] <= float(bound)
            word = texts("benchmarks", "met", "met") if met else f"**{texts('benchmarks', 'missed', 'missed')}**"
            goals.setdefault(key, []).append(f"{row['goal']}: {word}")

    def with_time(case: str, reference: str) -> str:
        measured = times.get((case.removesuffix(", speed").removesuffix(", time blocked"), reference))
        return reference if measured is None else f"{reference}, {measured:.3g} ms"

    return [
        _row(case, with_time(case, reference), "; ".join(found), "; ".join(goals.get((case, reference), [])))
        for (case, reference), found in cells.items()
    ]


def pages(folder: Path) -> dict[str, Callable[[], str]]:
    """Makers of all generated files, by path relative to ``folder``."""
    files = sorted((folder / "certificates").glob("*.json"))
    certificates = {file.stem: Certificate.model_validate_json(file.read_text(encoding="utf-8")) for file in files}
    made: dict[str, Callable[[], str]] = {
        f"{name}{suffix}.md": partial(page, texts)
        for suffix, texts in TEXTS.items()
        for name, page in {"contract": contract_page, "settings": settings_page}.items()
    }
    made |= {
        "certificate.schema.json": schema,
        "../conformance/src/lightrft/conformance/certificate.schema.json": schema,
        "certificates/README.md": partial(certificates_page, certificates),
    }
    results = folder / "peers.json"
    if results.is_file():
        peers = json.loads(results.read_text(encoding="utf-8"))
        for suffix, texts in TEXTS.items():
            made[f"peers{suffix}.md"] = partial(peers_page, peers, texts, f"note{suffix.replace('.', '_')}")
    for suffix, texts in TEXTS.items():
        readme = folder.parent / f"README{suffix}.md"
        if readme.is_file():
            made[f"../{readme.name}"] = partial(with_badges, readme.read_text(encoding="utf-8"), certificates, texts)
    measured = folder.parent / "benchmarks/baseline.json"
    if measured.is_file():
        runs = json.loads(measured.read_text(encoding="utf-8"))
        for suffix, texts in TEXTS.items():
            page = f"performance{suffix}.md"
            made[page] = partial(with_benchmarks, (folder / page).read_text(encoding="utf-8"), runs, texts)
    for name, certificate in certificates.items():
        for suffix in FORMATS.keys() - {".json"}:
            made[f"certificates/{name}{suffix}"] = partial(FORMATS[suffix], certificate)
    return made


def outdated(folder: Path) -> list[str]:
    """Return the files in ``folder`` that are outdated."""
    return [name for name, make in pages(folder).items() if _read(folder / name) != make()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the pages, or return 1 if ``--check`` found an outdated one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    options = parser.parse_args(None if arguments is None else list(arguments))
    folder = Path(__file__).parent
    if options.check:
        old = outdated(folder)
        print(f"not up to date: {', '.join(old)}; run python docs/build.py" if old else "up to date")
        return 1 if old else 0
    (folder / "certificates").mkdir(exist_ok=True)
    for name, make in pages(folder).items():
        (folder / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
    for name, current in TEXTS[".zh"].missing.items():
        print(f"docs/zh.toml: {name} is missing or older than the English text; translate it, with of = {current!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
