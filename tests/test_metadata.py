"""What PyPI and readers find first: URLs, links of package READMEs, and install commands, against the folders."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = {path.parent: tomllib.loads(path.read_text("utf-8")) for path in ROOT.glob("[pc]*/**/pyproject.toml")}
FOLDERS = {project["project"]["name"]: folder for folder, project in PROJECTS.items()}
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".nox", ".venv"} & set(path.relative_to(ROOT).parts))


def sisters(name: str) -> set[str]:
    """The packages of this repository that a package depends on, and itself."""
    declared = [re.match(r"[\w-]+", each)[0] for each in PROJECTS[FOLDERS[name]]["project"]["dependencies"]]
    return {name}.union(*(sisters(each) for each in declared if each in FOLDERS))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_urls_lead_into_the_repository(name):
    urls = PROJECTS[FOLDERS[name]]["project"]["urls"]
    assert urls.keys() == {"Documentation", "Repository", "Issues", "Changelog"}
    assert urls["Repository"] == REPOSITORY
    assert urls["Issues"] == f"{REPOSITORY}/issues"
    assert urls["Documentation"] == f"{REPOSITORY}/tree/main/docs"
    assert urls["Changelog"] == f"{REPOSITORY}/blob/main/{FOLDERS[name].relative_to(ROOT)}/CHANGELOG.md"


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_links_of_a_package_readme_are_absolute(name):
    """They are shown on PyPI, too."""
    text = re.sub(r"```.*?```", "", (FOLDERS[name] / "README.md").read_text("utf-8"), flags=re.DOTALL)
    targets = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r"^\[[\w-]+\]: (.*)$", text, re.MULTILINE)]
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == set(re.findall(r"^\[([\w-]+)\]: ", text, re.MULTILINE))


def test_links_into_the_repository_lead_somewhere():
    links = [
        (page.relative_to(ROOT), path, anchor)
        for page in PAGES
        for path, anchor in re.findall(
            rf"{REPOSITORY}/(?:blob|tree)/main/([^\s)#]+)(?:#([\w-]+))?", page.read_text("utf-8")
        )
    ]
    assert links
    broken = [
        link for link in links if not (ROOT / link[1]).exists() or (link[2] and link[2] not in anchors(ROOT / link[1]))
    ]
    assert broken == []


def test_git_urls_name_folders_of_packages():
    """``url`` is a variable of a shell block."""
    urls = [
        (page.relative_to(ROOT), name, url, folder)
        for page in PAGES
        for name, url, folder in re.findall(
            r'"([\w-]+)(?:\[\w+\])? @ (\S+?)#subdirectory=([\w/-]+)"', page.read_text("utf-8")
        )
    ]
    assert urls
    assert [
        each for each in urls if FOLDERS.get(each[1]) != ROOT / each[3] or each[2] not in ("$url", f"git+{REPOSITORY}")
    ] == []


def test_pip_commands_name_every_package_that_they_need():
    commands = [
        (page.relative_to(ROOT), command)
        for page in PAGES
        for command in re.findall(r"^pip install ((?:\\\n|[^\n])*)$", page.read_text("utf-8"), re.MULTILINE)
        if "./packages" in command or "#subdirectory" in command
    ]
    assert len(commands) > 1
    for page, command in commands:
        named = set(re.findall(r"lightrft-[\w-]+(?= @)", command)) | {
            Path(path).name for path in re.findall(r"\./packages/[\w-]+", command)
        }
        assert named == set().union(*map(sisters, named)), page
