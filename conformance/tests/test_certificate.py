"""Certificates: what they say of which reports, in each format, and which reports do not belong together."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from lightrft.conformance.certificates.certificate import SCHEMA_FILE, Certificate
from lightrft.conformance.certificates.formats import FORMATS
from lightrft.conformance.certificates.reports import combine
from lightrft.conformance.certification import Report
from lightrft.conformance.cli import app
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult, Verdict
from lightrft.conformance.provenance import class_of, digest_of, digest_of_suite
from lightrft.conformance.requests import Request
from lightrft.strategy import FakeStrategy

HOLDS_FOR = "Holds only for the code with the digests at the end of this page"
IDENTITY = {
    "class": "a.B", "capabilities": ["unprepared_models"], "grouped": True, "digest": "sha256:1", "distribution": "some",
    "version": "1.2", "requirements": {"x": "3"},
}  # fmt: skip


def result(clause: str, verdict: Verdict = "pass", **more: Any) -> ClauseResult:
    return ClauseResult(id=clause, level=CONTRACT[clause].level, verdict=verdict, **{"examples": 3, **more})


class Folder:
    """Writes reports, and makes certificates of them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def report(
        self, *results: ClauseResult, identity: dict[str, Any] = IDENTITY, change: dict[str, Any] | None = None,
        **request: Any,
    ) -> Path:  # fmt: skip
        made = Report(request=Request(**{"strategy": "mine", **request}), identity=identity, results=list(results))
        file = self.path / f"{len(list(self.path.iterdir()))}.json"
        file.write_text(json.dumps(made.to_json() | (change or {})), encoding="utf-8")
        return file

    def certificate(self, *results: ClauseResult, **more: Any) -> Certificate:
        return combine([self.report(*results, **more)])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def complete(folder: Folder) -> Certificate:
    """Two world sizes, with every verdict that a certified strategy may have, and texts to escape."""
    skipped = result("COLL-1", "skip", examples=0, message="needs world size 2")
    expected = result("OPT-2", "xfail", message="expected: a < b | c, https://example.org/1\nmore")
    one = [result("LIFE-2", drawn=200, examples=203), skipped, expected]
    two = [result("LIFE-2", drawn=200, examples=203), result("COLL-1", drawn=14), expected]
    reports = [
        folder.report(*results, world=world, profile="certify", settings={"bf16": False}, seed=7)
        for world, results in ((2, two), (1, one))
    ]
    return combine(reports)


def test_reports_of_several_world_sizes_give_one_certificate(complete: Certificate) -> None:
    assert complete.headline == (
        "Certified: world sizes 1 and 2, profile certify, up to 200 programs drawn per clause, except OPT-2, expected to fail"
    )
    assert [run.world_size for run in complete.runs] == [1, 2]
    verdicts = {clause.id: [one.verdict for one in clause.results if one] for clause in complete.clauses}
    assert verdicts == {"LIFE-2": ["pass", "pass"], "COLL-1": ["skip", "pass"], "OPT-2": ["xfail", "xfail"]}
    assert complete.basis.startswith("415 programs ran.") and "for 2 of 3 clauses, up to 200" in complete.basis


def test_devices_are_named(folder: Folder) -> None:
    reports = [folder.report(result("LIFE-2"), world=world, device=d) for world, d in ((1, "cpu"), (1, "cuda"), (4, "cuda"))]  # fmt: skip
    assert combine(reports).headline.startswith("Certified: world size 1 and world sizes 1 and 4 on cuda")


@pytest.mark.parametrize(
    ("verdict", "level_of", "more", "expected"),
    [
        ("pass", "LIFE-2", {"profile": "smoke"}, "Checked: world size 1, profile smoke, pinned programs only"),
        ("pass", "LIFE-2", {"clauses": ("LIFE-2",)}, "Checked: world size 1, only LIFE-2"),
        ("fail", "LIFE-2", {"profile": "certify"}, "Not certified: world size 1, LIFE-2 does not hold"),
        ("hang", "LIFE-2", {}, "Not certified: world size 1, LIFE-2 does not hold"),
        ("fail", "COLL-6", {}, "Certified: world size 1, profile ci, pinned programs only"),
        ("error", "LIFE-2", {}, "Could not be judged: LIFE-2"),
        ("error", "COLL-6", {}, "Could not be judged: COLL-6"),
        ("skip", "LIFE-2", {}, "Could not be judged: no clause was judged at world size 1, cpu"),
    ],
)
def test_the_headline_says_no_more_than_was_judged(
    folder: Folder, verdict: Verdict, level_of: str, more: dict[str, Any], expected: str
) -> None:
    assert folder.certificate(result(level_of, verdict, message="why"), **more).headline == expected


def test_one_weak_run_decides(folder: Folder) -> None:
    strong = folder.report(result("LIFE-2", drawn=200), profile="certify")
    assert combine([strong]).verdict == "certified"
    assert combine([strong, folder.report(result("LIFE-2"), world=2, profile="smoke")]).verdict == "checked"
    assert combine([strong, folder.report(result("LIFE-2", "fail"), world=2)]).verdict == "not certified"


def test_runs_of_which_one_judged_no_clause_certify_nothing(folder: Folder) -> None:
    reports = [
        folder.report(result("LIFE-2")),
        folder.report(world=2),
        folder.report(result("LIFE-2", "skip"), world=4),
    ]
    words = "Could not be judged: no clause was judged at world size 2, cpu and world size 4, cpu"
    assert combine(reports).headline == words
    assert folder.certificate().headline.endswith("no clause was judged at world size 1, cpu")


def test_builds_of_one_version_belong_together_and_other_code_does_not_whichever_run_is_unjudged(
    folder: Folder,
) -> None:
    unjudged = folder.report(identity={}, change={"unjudged": "no network", "exit_code": 2})
    identities = [{**IDENTITY, "digest": digest, "requirements": {"torch": torch}} for digest, torch in (("a", "2.13.0+cpu"), ("a", "2.13.0+cu130"), ("b", "2.13.0"))]  # fmt: skip
    cpu, cuda, other = (
        folder.report(result("LIFE-2"), identity=identity, world=world) for world, identity in enumerate(identities, start=2)
    )  # fmt: skip
    certificate = combine([unjudged, cpu, cuda])
    assert (certificate.verdict, certificate.subject.digest) == ("not judged", "a")
    with pytest.raises(ValueError, match="different code digests"):
        combine([unjudged, cpu, other])


def test_a_strategy_that_cannot_be_created(folder: Folder) -> None:
    reason = {"unjudged": "rank 0: no such module\nmore", "exit_code": 2}
    certificate = folder.certificate(identity={}, change=reason)
    assert certificate.headline == "Could not be judged: rank 0: no such module"
    assert "# No certificate: mine" in FORMATS[".md"](certificate)


def test_the_certificate_of_an_engine_has_its_name_and_digest(folder: Folder) -> None:
    engine = {"class": "some.engines.Mine", "digest": "sha256:2", "distribution": "engines", "version": "3"}
    certificate = folder.certificate(
        result("ENG-1"), identity={**IDENTITY, "engine": engine}, engine="some.engines:Mine"
    )
    text = FORMATS[".md"](certificate)
    assert text.startswith("# Certificate: Mine on mine\n")
    assert "engines 3" in text and "| engine | `sha256:2` |" in text


def test_markdown_has_all_that_is_needed_to_read_and_to_repeat_it(complete: Certificate) -> None:
    text = FORMATS[".md"](complete)
    for words in (
        HOLDS_FOR, f"**{complete.headline}**", "some 1.2 (with x 3)", "`bf16=False`", "| strategy | `sha256:1` |", complete.suite.digest,
        "### Lifecycle and process group", CONTRACT["LIFE-2"].text, "| pass, 203 | pass, 203 |", "| skip | pass, 3 |",
        "| OPT-2 | world size 1, cpu; world size 2, cpu | a &#60; b &#124; c, https://example.org/1 |",
        "| COLL-1 | world size 1, cpu | needs world size 2 |", "--world-size 2 --device cpu --set bf16=False --profile certify --seed 7",
    ):  # fmt: skip
        assert words in text, words
    assert text.index("### Lifecycle") < text.index("### Collectives") < text.index("### Gradients")
    cells = {line.count(" | ") for line in text.splitlines() if line.startswith(("| LIFE-2", "| COLL-1 | MUST"))}
    assert cells == {4}


def test_html_is_one_valid_page_without_references(complete: Certificate) -> None:
    class Page(HTMLParser):
        opened: list[str] = []
        references: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link", "img", "br"):
                self.opened.append(tag)
            self.references += [value or "" for name, value in attrs if name in ("src", "href")]

        def handle_endtag(self, tag: str) -> None:
            assert self.opened.pop() == tag

    page, text = Page(), FORMATS[".html"](complete)
    page.feed(text)
    assert not page.opened and not page.references and "url(" not in text
    assert HOLDS_FOR in text and complete.suite.digest in text and complete.subject.digest in text
    assert "a &lt; b | c" in text and complete.headline in text and CONTRACT["COLL-1"].text in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_markdown_shows_what_reports_contain_as_text(folder: Folder) -> None:
    image, link, fence = "<img src=x>", "![i](https://example.org)", "````\n# no"
    identity = {**IDENTITY, "class": "a`b|c", "capabilities": [image], "distribution": image}
    text = FORMATS[".md"](
        folder.certificate(
            result("LIFE-2", "xfail", message=f"expected: {link} {image} \\| x"), identity=identity,
            settings={"x|y": image, "z": fence}, strategy=f"{image}{link}", change={"reproduce": fence},
        )
    )  # fmt: skip
    outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)
    assert "<img" not in outside and "](" not in outside and link not in text
    assert "| strategy | `` a`b\\|c `` |" in text and f"`x\\|y={image}`" in text
    assert f"-->\n`````\n{fence}\n`````\n" in text
    assert "&#92;&#124; x |" in text


@pytest.mark.parametrize("suffix", [".svg", ".html", ".md"])
def test_no_format_contains_control_characters(folder: Folder, suffix: str) -> None:
    reason = {"unjudged": "\x1b[31mred\x00\x0b\x1f\ufffe\n", "exit_code": 2}
    text = FORMATS[suffix](folder.certificate(identity={}, change=reason, strategy="m\x1bine"))
    assert "[31mred" in text and not re.search(r"[\x00-\x08\x0b-\x1f\ufffe]", text)
    if suffix == ".svg":
        assert ElementTree.fromstring(text).get("aria-label", "").startswith("mine: ")


@pytest.mark.parametrize(
    ("profile", "expected"), [("certify", "LightRFT certified, 1 exception · ranks 1, 2"), ("smoke", "LightRFT checked, 1 exception · ranks 1, 2")]
)  # fmt: skip
def test_the_badge_has_verdict_exceptions_and_ranks(folder: Folder, profile: str, expected: str) -> None:
    reports = [folder.report(result("OPT-2", "xfail", message="x"), world=world, profile=profile) for world in (1, 2)]
    image = ElementTree.fromstring(FORMATS[".svg"](combine(reports)))
    texts = [element.text for element in image.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["mine", expected]


def test_json_follows_the_published_schema(complete: Certificate) -> None:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    made = json.loads(FORMATS[".json"](complete))
    jsonschema.validate(made, schema)
    assert Certificate.model_validate(made) == complete
    for broken in (made | {"verdict": "perfect"}, {key: value for key, value in made.items() if key != "suite"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


BROKEN: dict[str, tuple[str, str]] = {
    "missing": ("", "No such file"),
    "not JSON": ("{", "not valid JSON"),
    "another file": ('{"a": 1}', "field required"),
    "a number": ("1", "valid dictionary"),
    "no reports": ("[]", "at least one report"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_report_is_one_line_and_exit_code_2(
    folder: Folder, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BROKEN[name]
    file = folder.path / "broken.json"
    if content:
        file.write_text(content, encoding="utf-8")
    refused(capsys, words, str(file))


def test_an_error_names_the_field_at_any_level(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(folder.report(result("LIFE-2"), result("COLL-1")).read_text(encoding="utf-8"))
    del report["clauses"][1]["level"]
    certificate = json.loads(certified(folder).read_text(encoding="utf-8"))
    del certificate["suite"]["digest"]
    file = folder.path / "broken.json"
    file.write_text(json.dumps([report]), encoding="utf-8")
    refused(capsys, f"got {file}: clauses.1.level: field required", str(file))
    file.write_text(json.dumps(certificate), encoding="utf-8")
    code, text = verified(capsys, file)
    assert code == 2 and f"got {file}: suite.digest: field required" in text


DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "strategies": ("different strategies: mine", {"strategy": "yours"}),
    "settings": ("different settings", {"settings": {"bf16": True}}),
    "engines": ("different engines", {"identity": {**IDENTITY, "engine": {"class": "e.F"}}}),
    "code": ("different code digests: ['sha256:1']", {"identity": {**IDENTITY, "digest": "sha256:9"}}),
    "suites": ("different suite digests", {"change": {"suite_digest": "sha256:9"}}),
    "versions": (
        "different versions: {'x': '3'} at world size 1, cpu, and {'x': '4'} at world size 2, cpu",
        {"identity": {**IDENTITY, "requirements": {"x": "4"}}},
    ),
    "packages": ("{'x': '3'} at world size 1, cpu, and {'x': None}", {"identity": {**IDENTITY, "requirements": {}}}),
    "releases": ("{'some': '1.2'}", {"identity": {**IDENTITY, "version": "1.3"}}),
    "none": ("several of world size 1, cpu", {"world": 1}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_reports_that_do_not_belong_together_are_one_line_and_exit_code_2(
    folder: Folder, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, more = DIFFERENT[what]
    files = [folder.report(result("LIFE-2")), folder.report(result("LIFE-2"), **{"world": 2, **more})]
    refused(capsys, words, *map(str, files))


def refused(capsys: pytest.CaptureFixture[str], words: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["certificate", *arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.count("\n") == 1 and words in printed.err and not printed.out


def test_the_command_writes_every_format(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder.report(result("LIFE-2"))
    outputs = [folder.path / f"certificate{suffix}" for suffix in FORMATS]
    with pytest.raises(SystemExit) as ended:
        app(["certificate", str(report), *(f"--output={output}" for output in outputs)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "Certified: world size 1, profile ci, pinned programs only\n"
    for output in outputs:
        assert output.read_text(encoding="utf-8") == FORMATS[output.suffix](combine([report]))


def certified(folder: Folder, engine: str = "", digest: str = "", suite: str = "") -> Path:
    """The certificate of `FakeStrategy` as it is installed, or of code, or by a ``suite``, with another digest."""
    strategy = {"class": f"{FakeStrategy.__module__}.FakeStrategy", "digest": digest or digest_of(FakeStrategy)}
    engines = {"engine": {"class": engine, "digest": "sha256:2"}} if engine else {}
    change = {"suite_digest": suite} if suite else {}
    made = folder.certificate(result("ENG-1"), identity={**IDENTITY, **strategy, **engines}, change=change)
    file = folder.path / "made.json"
    file.write_text(FORMATS[".json"](made), encoding="utf-8")
    return file


def verified(capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        app(["verify", *map(str, files)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def test_a_certificate_of_other_code_than_the_installed_is_recognized(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    current = certified(folder)
    assert verified(capsys, current) == (0, f"{current}: holds for the installed code\n")
    words = f"strategy: certified sha256:1, installed {digest_of(FakeStrategy)}"
    assert verified(capsys, certified(folder, digest="sha256:1")) == (1, f"{current}: holds for other code; {words}\n")
    words = f"suite: certified sha256:3, installed {digest_of_suite()}"
    assert verified(capsys, certified(folder, suite="sha256:3")) == (1, f"{current}: holds for other code; {words}\n")
    code, text = verified(
        capsys, certified(folder, engine="lightrft.strategy.rollout.fake_engine.FakeEngine", digest="sha256:1")
    )
    assert code == 1 and "; strategy: " in text and "; engine: certified sha256:2, installed sha256:" in text


@pytest.mark.parametrize("engine", ["no_module.Engine", "os.NoClass", "os.getcwd", "not a name"])
def test_a_certificate_of_code_that_is_not_installed_is_one_line_and_exit_code_2(
    folder: Folder, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = verified(capsys, certified(folder, engine=engine))
    assert code == 2 and text.count("\n") == 1 and engine.partition(".")[0] in text


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_what_is_no_certificate_is_not_verified(
    folder: Folder, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder.path / "other.json"
    file.write_text(content, encoding="utf-8")
    code, text = verified(capsys, file)
    assert code == 2 and text.count("\n") == 1 and f"expected a certificate in JSON, got {file}" in text


def test_an_output_of_another_format_is_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys, "expected a file named .md, .html, .svg, .json", str(folder.report(result("LIFE-2"))), "--output=x.pdf"
    )
    refused(capsys, "existing directory", str(folder.report(result("LIFE-2"))), "--output=missing/x.md")


def test_an_output_in_the_home_directory_is_written_there(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.path))
    monkeypatch.chdir(folder.path)
    report = str(folder.report(result("LIFE-2")))
    refused(capsys, "a home directory that exists", report, "--output=~nobody-has-this-name/x.md")
    with pytest.raises(SystemExit) as ended:  # shells leave "~" as it is after "="
        app(["certificate", report, "--output=~/home.md"])
    assert ended.value.code == 0 and (folder.path / "home.md").read_text(encoding="utf-8")
    assert not (folder.path / "~").exists()


@pytest.mark.parametrize("command", ["certificate", "verify"])
def test_json_that_is_nested_too_deeply_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nested.json"
    file.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        app([command, str(file)])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.count("\n") == 1 and f"got {file}: " in printed


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no accelerator')", "got RuntimeError('no accelerator')"),
        ("import sys; sys.exit(3)", "got SystemExit(3)"),
        ("Name = 3", "expected a class at 'ends_here.Name', got 3"),
        ("", "has no attribute 'Name'"),
    ],
)
def test_a_certified_class_that_cannot_be_imported_is_refused(
    tmp_path: Path, code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_here.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ends_here", raising=False)
    with pytest.raises(ImportError) as raised:
        class_of("ends_here.Name")
    assert words in str(raised.value)
