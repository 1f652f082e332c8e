"""Generate and execute the notebooks: `python notebooks/build.py`, or `--check` that they belong to the sources.

Every `src/NN_name.py` (jupytext's percent format) becomes `NN_name.ipynb`, in which the exercises are open, run from
top to bottom in a fresh kernel of this interpreter, with its outputs; and `solutions/NN_name.md`, a page of text with
the solved cell of each exercise. Figures are kept at 1.5 dots per pixel of their width on the page, in 64 colours.
Nothing that differs from machine to machine is kept: no times, no versions, no dead widgets. A path of this machine or
a word on stderr in an output is an error, not something to hide.

In a source, a Markdown cell that begins with `{exercise} 04.2` gets that exercise's heading from
`minirl_edu.course`, and its hints below its text. A cell `{capstone} 04` becomes what lessons/capstone.md says about
step 04. In a code cell, what stands between `# solution` and `# end` is left out of the student's notebook: `raise
NotImplementedError` takes its place, or the text after `# solution:`.
"""

import argparse
import base64
import hashlib
import io
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from queue import Empty
from typing import Any

import jupytext
import nbformat
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from traitlets import Type, default

from minirl_edu.course import find, heading, hint_ladder

FOLDER = Path(__file__).resolve().parent
DENSITY, COLOURS = 1.5, 64
WIDGET = "application/vnd.jupyter.widget-view+json"
SOLUTION = re.compile(r"^([ ]*)# solution(?:: ([^\n]*))?\n(.*?)^[ ]*# end\n?", re.MULTILINE | re.DOTALL)


def generate(source: Path, *, solution: bool = False) -> NotebookNode:
    """The notebook of a source, not executed: the same source always gives the same cells with the same ids.

    `solution`: with the exercises solved, instead of left open; it is executed by tests and not kept.
    """
    parsed = _parsed(source)
    note = f"*Generated from `notebooks/src/{source.name}`: edit that, then run `make notebooks`."
    if solutions(source):
        note += f" Solutions: [solutions/{source.stem}.md](solutions/{source.stem}.md)."
    for cell in parsed.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(_solved if solution else _open, f"{cell.source}\n").rstrip("\n")
        elif cell.source.startswith("{exercise}"):
            cell.source = _exercise(cell.source)
        elif cell.source.startswith("{capstone}"):
            cell.source = capstone(cell.source.removeprefix("{capstone}").strip())
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(f"{note}*"), *parsed.cells],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = NotebookNode()
    return notebook


def solutions(source: Path) -> str:
    """The page with a source's solutions: of each exercise what is asked, and its cell, solved. Empty without any."""
    cells, page = _parsed(source).cells, []
    for asked, cell in pairwise(cells):
        if cell.cell_type == "code" and SOLUTION.search(f"{cell.source}\n"):
            question = _question(asked.source).removeprefix("#").replace("](../", "](../../")  # it lies a folder deeper
            code = SOLUTION.sub(_solved, f"{cell.source}\n").rstrip("\n")
            page.append(f"{question}\n\n```python\n{code}\n```\n")
    if not page:
        return ""
    title = next(line for cell in cells for line in cell.source.splitlines() if line.startswith("# "))
    lab = f"../{source.stem}.ipynb"
    note = f"*Solutions of [the lab]({lab}), generated from `notebooks/src/{source.name}`.*"
    return "\n".join([f"{title}: solutions\n", f"{note}\n", *page])


def capstone(step: str) -> str:
    """What lessons/capstone.md says about a step ("04"), without its heading. Raises ValueError for an unknown step."""
    page = (FOLDER.parent / "lessons" / "capstone.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## Step (\d\d) [^\n]*\n+(.*?)\s*(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    if step not in sections:
        raise ValueError(f"{{capstone}} {step}: lessons/capstone.md has the steps {', '.join(sections)}")
    return re.sub(r"\]\((?!\.\./|#|https?:)", "](../lessons/", sections[step])


def _parsed(source: Path) -> NotebookNode:
    return jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")


def _question(text: str) -> str:
    """Heading of an exercise, and what is asked."""
    first, _, rest = text.partition("\n")
    return f"{heading(find(first.removeprefix('{exercise}').strip()))}\n\n{rest.strip()}"


def _exercise(text: str) -> str:
    """The cell of an exercise: heading, what is asked, hints."""
    exercise = find(text.partition("\n")[0].removeprefix("{exercise}").strip())
    return f"{_question(text)}\n\n{hint_ladder(exercise)}"


def _solved(match: re.Match[str]) -> str:
    return match[3]


def _open(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2] or 'raise NotImplementedError  # your turn'}\n"


class _Channel(AsyncZMQSocketChannel):
    """Looks once a second: on busy machines a poll has been seen to sleep through a message until its timeout."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await super().get_msg(min(1.0, max(0.0, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end:
                    raise


class _Client(AsyncKernelClient):
    shell_channel_class = Type(_Channel)
    iopub_channel_class = Type(_Channel)


class _Kernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this, whatever kernelspecs the user or the machine has installed."""

    client_factory = Type(_Client)

    @default("kernel_spec_manager")
    def _own_environment(self) -> KernelSpecManager:
        return KernelSpecManager(parent=self, kernel_dirs=[str(Path(sys.prefix, "share", "jupyter", "kernels"))])

    @default("transport_encryption")
    def _encrypted_where_it_can(self) -> str:
        return "auto"  # else newer kernels warn on every start


def execute(notebook: NotebookNode, *, timeout: int = 600) -> None:
    """Run all cells in place. Raises CellExecutionError at the first that fails (`timeout`: seconds for one cell)."""
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook,
        kernel_manager_class=_Kernel,
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    with tempfile.TemporaryDirectory() as ipython:  # nobody's IPython profile has a say
        client.execute(env={**os.environ, "IPYTHONDIR": ipython})
    notebook.metadata = NotebookNode(metadata)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":  # a widget without its kernel is a dead picture
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]


def shrink_figures(notebook: NotebookNode) -> None:
    """Redraw the PNGs of the outputs in place: 1.5 dots per pixel of the width they are shown with, in 64 colours.

    Half the bytes, equal to the eye. A figure without a width keeps its dots.
    """
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" not in output.get("data", {}):
            continue
        before = base64.b64decode(output.data["image/png"])
        width = output.metadata.get("image/png", {}).get("width")
        after = _shrunk(before, None if width is None else round(DENSITY * width))
        if len(after) < len(before):
            output.data["image/png"] = base64.b64encode(after).decode("ascii")


def _shrunk(png: bytes, width: int | None) -> bytes:
    picture = Image.open(io.BytesIO(png))
    image = Image.new("RGB", picture.size, "white")
    image.paste(picture.convert("RGBA"), mask=picture.convert("RGBA").getchannel("A"))
    if width is not None and width < image.width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    # As plots.to_png does; the median cut, Pillow's default, blends the colour of a thin line into its neighbours'. It
    # makes white a light grey, which shows on a white page.
    image = image.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette = image.getpalette() or []
    colours = [palette[i : i + 3] for i in range(0, len(palette), 3)]
    image.putpalette([value for colour in colours for value in ([255] * 3 if min(colour) > 250 else colour)])
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def blemishes(notebook: NotebookNode) -> list[str]:
    """What must not be in a notebook that others read: errors, stderr, paths of this machine."""
    found = []
    paths = {str(FOLDER.parent), str(Path.home()), tempfile.gettempdir(), sys.prefix} - {"/"}
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            where = f"cell {number} ({cell.source.splitlines()[0]})"
            if output.output_type == "error":
                found.append(f"{where}: {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"{where} writes to stderr: {output.text.strip()[:200]}")
            text = str({k: v for k, v in output.get("data", output).items() if not k.startswith("image/")})
            found += [f"{where} shows the path {path}" for path in sorted(paths) if path in text]
    return found


def targets(source: Path, folder: Path = FOLDER) -> tuple[Path, Path]:
    """Where the notebook of a source and the page with its solutions lie."""
    return folder / f"{source.stem}.ipynb", folder / "solutions" / f"{source.stem}.md"


def out_of_date(folder: Path = FOLDER) -> list[str]:
    """Where the notebooks and solutions in `folder` are not those of the sources in `folder`/src.

    Outputs are not compared.
    """
    sources = sorted(folder.glob("src/*.py"))
    wanted = {path: source for source in sources for path in targets(source, folder)}
    there = sorted([*folder.glob("*.ipynb"), *folder.glob("solutions/*")])
    found = [f"{path.relative_to(folder)} has no source" for path in there if path not in wanted]
    for path, source in wanted.items():
        if not path.exists():
            found.append(f"{path.relative_to(folder)} was not generated")
        elif path.suffix == ".md":
            if path.read_text(encoding="utf-8") != solutions(source):
                found.append(f"{path.relative_to(folder)} is not that of src/{source.name}")
        elif _cells(nbformat.read(path, as_version=4)) != _cells(generate(source)):
            found.append(f"{path.relative_to(folder)} is not that of src/{source.name}")
    return found


def build(source: Path) -> None:
    """Generate, execute and write the notebook of a source, and write its solutions.

    Raises RuntimeError if the notebook's outputs have blemishes.
    """
    path, page = targets(source)
    notebook = generate(source)
    execute(notebook)
    if found := blemishes(notebook):
        raise RuntimeError("\n".join([f"{path.relative_to(FOLDER)} was not written:", *found]))
    shrink_figures(notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    page.parent.mkdir(exist_ok=True)
    page.write_text(solutions(source), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Build the notebooks, or with `--check` only say which ones are out of date; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate and execute the notebooks from notebooks/src.")
    parser.add_argument("units", nargs="*", help="numbers, such as 04 05 (default: all)")
    parser.add_argument("--fast", action="store_true", help="in the setting of continuous integration")
    parser.add_argument("--check", action="store_true", help="compare with the sources, execute nothing")
    arguments = parser.parse_args(argv)
    if arguments.check:
        found = out_of_date()
        print("\n".join([*found, "run: make notebooks"] if found else ["the notebooks are those of their sources"]))
        return int(bool(found))
    if arguments.fast:
        os.environ["MINIRL_LABS"] = "fast"
    for source in sorted(FOLDER.glob("src/*.py")):
        if arguments.units and source.name[:2] not in arguments.units:
            continue
        build(source)
        for path in targets(source):
            print(f"notebooks/{path.relative_to(FOLDER)}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _cells(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    return [(cell.cell_type, cell.get("id", ""), cell.source) for cell in notebook.cells]


if __name__ == "__main__":
    sys.exit(main())
