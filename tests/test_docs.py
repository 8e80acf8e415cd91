"""The documents: links that lead somewhere, commands that are read, programs that run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest

from workbench import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^()\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
names = pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)


def prose(path: Path) -> str:
    """What a person reads: a page without its blocks of code, or the texts of a notebook."""
    if path.suffix == ".md":
        return BLOCK.sub("", path.read_text(encoding="utf-8"))
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub makes fragments of them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return LINK.findall(prose(path))


def test_the_house_names_every_file() -> None:
    house = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "workbench").rglob("*.*") if path.suffix in {".py", ".js", ".css"}}
    assert set(re.findall(r"`(?:panels/)?([\w.]+\.(?:py|js|css))`", house)) == rooms


@names
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        url = urlsplit(link)
        if url.scheme:
            assert (url.scheme, bool(url.netloc)) == ("https", True), link
            continue
        target = (path.parent / url.path).resolve() if url.path else path
        assert target.exists(), f"{path.name}: {link}"
        if url.fragment:
            assert url.fragment in anchors(target), f"{path.name}: {link}"


def test_every_page_and_notebook_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page) if ":" not in link)
        todo += [t for t in targets if t not in reached and t.suffix in {".md", ".ipynb"} and t.exists()]
    # What `make lab` opens, among others.
    not_linked = {ROOT / "CHANGELOG.md", ROOT / "notebooks" / "workbench.ipynb"}
    assert {*PAGES, *NOTEBOOKS} - reached - not_linked == set()


def test_badges_and_install_lines_name_one_repository_and_files_that_it_has() -> None:
    """Wherever the repository's own address stands it is the same: whoever publishes it changes one word."""
    texts = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *NOTEBOOKS]}
    found = set(chain.from_iterable(re.findall(r"[\w.-]+/llm-device-workbench\b", text) for text in texts.values()))
    assert len(found) == 1
    opened = [link for path in texts for link in links(path) if "colab.research" in link or "mybinder.org/v2/" in link]
    files = [link.partition("/blob/main/")[2] for link in opened if "/blob/main/" in link]
    files += [parse_qs(urlsplit(link).query)["urlpath"][0].removeprefix("lab/tree/") for link in opened if "?" in link]
    assert "notebooks/colab.ipynb" in files
    for name in files:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_are_read(path: Path) -> None:
    """Every line that begins with ``workbench`` is one that the command takes."""
    text = path.read_text(encoding="utf-8")
    in_blocks = (line for kind, block in BLOCK.findall(text) if kind == "sh" for line in block.splitlines())
    inline = re.findall(r"`(workbench (?:plan|fits|lab)[^`]*)`", text)
    for line in [*(line for line in in_blocks if line.startswith("workbench ")), *inline]:
        words = shlex.split(line, comments=True)[1:]
        if words != ["plan"] and words[-1] not in {"--help", "fits"}:  # named in passing
            cli._parser().parse_args(words)


def test_the_programs_in_the_tutorial_run(demo_model: Path, tmp_path: Path) -> None:
    """One after the other, in one process, as a reader would."""
    blocks = [
        block for kind, block in BLOCK.findall((ROOT / "docs/tutorial.md").read_text("utf-8")) if kind == "python"
    ]
    program = "\n".join(blocks)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "as previewed" in result.stdout
    assert "Paris" in result.stdout
    assert "from_pretrained(" in result.stdout
