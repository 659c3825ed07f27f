"""What a tag releases, and tags that release nothing."""

import pytest
from tools.release import ReleaseError, read_release


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "lightrft-fsdp"\nversion = "0.3.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.3.0\n\n- Faster.\n\n## 0.2.0\n\n- First.\n")
    (tmp_path / "README.md").write_text("# lightrft-fsdp\n")
    return {"lightrft-fsdp": tmp_path}


@pytest.mark.parametrize("heading", ["## 0.3.0", "## 0.3.0 (2026-11-29)"])
def test_a_tag_releases_one_package_with_the_newest_changes(folders, heading):
    changelog = folders["lightrft-fsdp"] / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("## 0.3.0", heading))
    release = read_release("lightrft-fsdp-v0.3.0", folders)
    assert (release.name, release.version, release.notes) == ("lightrft-fsdp", "0.3.0", "- Faster.\n")


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("v0.3.0", "expected a tag NAME-vVERSION"),
        ("lightrft-fspd-v0.3.0", "with NAME one of lightrft-fsdp"),
        ("lightrft-fsdp-0.3.0", "expected a tag NAME-vVERSION"),
        ("lightrft-fsdp-v0.4.0", "expected version 0.3.0"),
    ],
)
def test_a_tag_that_fits_no_package_is_refused(folders, tag, said):
    with pytest.raises(ReleaseError, match=said):
        read_release(tag, folders)


@pytest.mark.parametrize(
    "changes",
    ["# Changelog\n", "# Changelog\n\n## 0.2.0\n\n- First.\n", "# Changelog\n\n## 0.3.0\n\n## 0.2.0\n\n- First.\n"],
)
def test_a_release_needs_its_changes(folders, changes):
    (folders["lightrft-fsdp"] / "CHANGELOG.md").write_text(changes)
    with pytest.raises(ReleaseError, match=r"CHANGELOG.md to begin with the changes of 0\.3\.0"):
        read_release("lightrft-fsdp-v0.3.0", folders)


def test_a_readme_that_says_the_package_is_unpublished_is_refused(folders):
    (folders["lightrft-fsdp"] / "README.md").write_text("It is not on PyPI yet.\n")
    with pytest.raises(ReleaseError, match="Remove the sentence"):
        read_release("lightrft-fsdp-v0.3.0", folders)
