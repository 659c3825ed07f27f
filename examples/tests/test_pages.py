"""What the documentation shows: its scripts run, its commands succeed, and they print what it says."""

import pages
import pytest

PAGES = [
    page
    for page in [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").rglob("*.md"))]
    if not page.name.endswith(".zh.md") and pages.blocks(page.read_text(encoding="utf-8"))
]
"""Those in English; tests/test_readmes.py compares the code of the others with theirs."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_a_page_does_what_it_says(page, tmp_path):
    pages.run(page.read_text(encoding="utf-8"), tmp_path)


RANKS_FAIL = """```python
# fail.py
import os

raise SystemExit("AB"[int(os.environ["RANK"])])
```

```console
$ torchrun --nproc-per-node 2 fail.py
...
A
```
"""
"""It shows the error of rank 0 only."""


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```console\n$ echo one\ntwo\n```\n", "the page says"),
        ("```console\n$ echo one\n$ echo two\n```\n", "the page says"),
        ("```sh\nfalse\n```\n", "exit code 1"),
        ("```console\n$ echo Error >&2; false\nanother Error\n```\n", "exit code 1"),
        ("```console\n$ false\n```\n", "exit code 1"),
        ("```console\n$ false\n...\n```\n", "exit code 1"),
        ("```console\n$ echo loss 1.0; echo Traceback >&2; exit 1\nloss 1.0\n```\n", "exit code 1"),
        ("```console\n$ echo loss 1.0; echo Traceback >&2; exit 1\nloss 1.0\n...\n```\n", "exit code 1"),
        (RANKS_FAIL, "exit code 1"),
        ("```python\nraise ValueError\n```\n", "exit code 1"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "the page says"),
        ("```toml\nname = 1\n```\n", "no comment explains"),
        ("<!-- not run: -->\n```sh\ntrue\n```\n", "explains nothing"),
        ("<!-- tested by: tests/no_such_test.py -->\n```sh\ntrue\n```\n", "names no file"),
        ("<!-- LICENSE -->\n```text\nno such line\n```\n", "not in"),
    ],
)
def test_a_page_that_says_something_else_is_noticed(page, said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        pages.run(page, tmp_path)


@pytest.mark.parametrize(
    "block",
    ["$ echo one; echo Error >&2; exit 1\none\nError\n", "$ echo Trace >&2; echo Error >&2; exit 1\n...\nError\n"],
)
def test_an_error_may_be_shown(block, tmp_path):
    pages.run(f"```console\n{block}```\n", tmp_path)


def test_dates_and_lines_left_out_may_differ(tmp_path):
    command = "printf 'one\\n[01-02 03:04:05] two\\nthree\\n'; pwd"
    pages.run(f"```console\n$ {command}\n...\n[11-29 11:00:00] two\n...\n{pages.FOLDER}\n```\n", tmp_path)


def test_the_output_of_a_script_is_below_it(tmp_path):
    pages.run("```python\nprint(1)\n```\n\n```text\n1\n```\n\nSomething else:\n\n```text\n2\n```\n", tmp_path)


def test_files_of_a_page_are_there_for_its_commands(tmp_path):
    pages.run("```python\n# add.py\nprint(1 + 1)\n```\n\n```console\n$ python add.py\n2\n```\n", tmp_path)
