"""The documentation: relative links resolve, README stays short, examples load."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from simpletuner import __version__
from simpletuner.cli import COMMANDS
from simpletuner.cli.train import command as train

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "node_modules", ".git", "work-nano", "output"}
    & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    found = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"{page.relative_to(ROOT)}: {target}")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            found.append(f"{page.relative_to(ROOT)}: {target} (no such heading)")
    return found


def test_every_relative_link_resolves() -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Title here\n[a](none.md) [b](page.md#title-here) [c](#none) [d](https://x.org)"
    )
    assert len(broken_links(page)) == 2


def test_readme_is_short_and_links_every_guide() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    linked = set(LINK.findall(readme))
    guides = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/densities.md"}
    assert guides <= linked


def test_every_command_that_the_docs_name_exists() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w/-])simpletuner ([a-z]+)\b(?= -|`| [a-z./]+=)", text):
            assert name in COMMANDS, f"{page.name}: simpletuner {name}"


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "examples").glob("*/")), ids=lambda path: path.name
)
def test_every_example_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "work")
    for name in ("pictures", "held_out"):
        (tmp_path / "work" / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    done = CliRunner().invoke(train, ["--show-config"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"[{folder.name}]" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == __version__


def test_workflows_name_what_is_there() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert "\t" not in text, path
    assert (ROOT / ".ci" / "run").is_file()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = ", project, re.MULTILINE) for extra in ("apple", "cpu"))
