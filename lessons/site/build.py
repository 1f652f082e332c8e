"""Build the site: `python lessons/site/build.py [--out DIR]`, into build/site/html.

The pages are the repository's own files, laid out as in the repository, so that a relative link works on GitHub and on
the site alike: README, which is the first page, lessons, notebooks with their stored outputs, results, the pages beside
this file, one page of API reference for each module, and a deck of slides for each unit. `sidebar.txt` says what the
side bar lists. A link to another file of the repository becomes a download; one to a folder leads to the folder's
README or its page of the reference, or becomes plain text. Warnings are errors: a page that is in no table of
contents, a link that leads nowhere, a public name without a docstring.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import api
import nbformat
import slides

ROOT = Path(__file__).resolve().parents[2]
SITE = Path("lessons/site")
LANDING = Path("README.md")
TEACHING = Path("lessons/TEACHING.md")
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "lessons/README.md", "lessons/[0-9][0-9]_*.md"),
    "lessons/capstone.md",
    *("lessons/site/*.md", "lessons/results/*.md", "lessons/results/worlds/README.md", "notebooks/README.md"),
    "notebooks/[0-9][0-9]_*.ipynb",
    *("notebooks/solutions/[0-9][0-9]_*.md", "scale/README.md", "benchmarks/README.md"),
)
# What the side bar lists below a page: how its entries begin, and the files.
CONTENTS = (
    ("lessons/README.md", "{unit} · {title}", "lessons/[0-9][0-9]_*.md"),
    ("notebooks/README.md", "{unit} · {title}", "notebooks/[0-9][0-9]_*.ipynb"),
)
LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^[ ]*(?:```|~~~).*?^[ ]*(?:```|~~~)[ ]*$|(?<!`)`[^`\n]+`(?!`))", re.MULTILINE | re.DOTALL)


def pages_of(root: Path) -> list[Path]:
    """The files of the repository that become pages, relative to it."""
    return [path.relative_to(root) for pattern in PAGES for path in sorted(root.glob(pattern))]


def place(path: Path) -> Path:
    """Where a page of the repository stands on the site."""
    return Path("index.md") if path == LANDING else path


def follow(target: Path, root: Path, pages: set[Path]) -> Path | None:
    """The file that a link to `target` of the repository shows on the site; None: nothing, it becomes plain text."""
    if target in pages:
        return place(target)
    if target.parts[:1] == (api.PACKAGE,):
        for page in (target.with_suffix(".md"), target / "index.md"):
            if page in pages:
                return page
    if (root / target).is_dir():
        return target / "README.md" if target / "README.md" in pages else None
    return target


def relink(text: str, origin: Path, root: Path, pages: set[Path], wanted: set[Path]) -> str:
    """A page's Markdown with its links as the site needs them; files that it shows or offers are added to `wanted`."""

    def one(match: re.Match[str]) -> str:
        bang, words, link = match.groups()
        name, _, anchor = link.partition("#")
        target = Path(os.path.normpath(origin.parent / name))
        if "://" in link or not name or name.startswith("mailto:") or not (root / target).exists():
            return match[0]  # a link that leads nowhere stays: Sphinx complains about it
        found = follow(target, root, pages)
        if found is None:
            return words
        if found not in pages and found != Path("index.md"):
            wanted.add(found)
        link = Path(os.path.relpath(found, place(origin).parent)).as_posix()
        return f"{bang}[{words}]({link}{f'#{anchor}' if anchor and found == place(target) else ''})"

    pieces = CODE.split(text)
    # The words of a link may be code, so only fences and code without a link around it are left alone.
    return "".join(piece if i % 2 else LINK.sub(one, piece) for i, piece in enumerate(_rejoined(pieces)))


def _rejoined(pieces: list[str]) -> list[str]:
    """Put inline code back into the text around it where that is the words of a link: [`code`](target)."""
    joined = [pieces[0]]
    for code, after in zip(pieces[1::2], pieces[2::2], strict=True):
        opened = joined[-1].rfind("[") > joined[-1].rfind("]")
        if opened and not code.lstrip().startswith(("```", "~~~")):
            joined[-1] += code + after
        else:
            joined += [code, after]
    return joined


def contents(page: Path, root: Path) -> str:
    """The tables of contents that go below a page; they show in the side bar."""
    found = ""
    for where, entry, pattern in CONTENTS:
        if Path(where) == page and (files := sorted(root.glob(pattern))):
            lines = []
            for path in files:
                name = Path(os.path.relpath(path, (root / page).parent)).with_suffix("").as_posix()
                lines.append(f"{entry.format(unit=path.name[:2], title=_title(path))} <{name}>")
            found += "\n".join(["", "```{toctree}", ":hidden:", "", *lines, "```", ""])
    return found


def _title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    match = re.search(r"^# (.+)$", text, re.MULTILINE)
    return match[1] if match else path.stem


def lay_out(root: Path, source: Path) -> None:
    """Write the site's sources: every page, and the files that pages show or offer."""
    reference = api.pages(root)
    files = pages_of(root)
    pages, wanted = {*files, *reference}, set[Path]()
    shutil.rmtree(source, ignore_errors=True)
    for path in files:
        new = source / place(path)
        new.parent.mkdir(parents=True, exist_ok=True)

        def adapt(text: str, origin: Path = path) -> str:
            return relink(text, origin, root, pages, wanted)

        if path.suffix == ".ipynb":
            _adapt_notebook(root / path, new, adapt)
        else:
            new.write_text(_page(path, root, adapt), encoding="utf-8")
    for path, text in reference.items():
        new = source / path
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
    for path in wanted:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, source / path)


def _page(path: Path, root: Path, adapt: Callable[[str], str]) -> str:
    """The text of a page. Solutions are left out of the side bar: the table of labs leads to them."""
    text = adapt((root / path).read_text(encoding="utf-8")) + contents(path, root)
    if path == LANDING:
        return text + (root / SITE / "sidebar.txt").read_text(encoding="utf-8")
    if path == TEACHING:
        return f'{text}\n\n## On this site\n\n<a href="../slides/index.html">The slides</a>, a deck for each unit.\n'
    return f"---\norphan: true\n---\n{text}" if path.parent.name == "solutions" else text


def _adapt_notebook(path: Path, new: Path, adapt: Callable[[str], str]) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = adapt(cell.source)
    nbformat.write(notebook, new)


def main(argv: Sequence[str] | None = None) -> int:
    """Lay out the sources and run Sphinx on them; returns its exit status."""
    parser = argparse.ArgumentParser(description="Build the site, offline; warnings are errors.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="default: build/site")
    out = parser.parse_args(argv).out
    source, html = out / "source", out / "html"
    try:
        lay_out(ROOT, source)
    except api.Undocumented as error:
        print(f"the site was not built: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(html, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", str(ROOT / SITE), "-d", str(out / "doctrees")]
    status = subprocess.run([*command, "-E", "-W", "--keep-going", "-q", str(source), str(html)]).returncode
    status = status or slides.build(ROOT, out / "slides", html / "slides")
    if status == 0:
        print(f"open {html / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
