"""Generate and execute the notebooks: `python notebooks/build.py`, or `--check` that they belong to the sources.

Every `src/NN_name.py` (jupytext's percent format) becomes `NN_name.ipynb` beside this file, run from top to bottom in a
fresh kernel of this interpreter, with its outputs. Nothing that differs from machine to machine is kept: no times, no
versions, no dead widgets. A path of this machine or a word on stderr in an output is an error, not something to hide.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import default

FOLDER = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def generate(source: Path) -> NotebookNode:
    """The notebook of a source, not executed: the same source always gives the same cells with the same ids."""
    parsed = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    note = f"*Generated from `notebooks/src/{source.name}`: edit that, then run `make notebooks`.*"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(note), *parsed.cells],
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


class _Kernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this, whatever kernelspecs the user or the machine has installed."""

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


def out_of_date(folder: Path = FOLDER) -> list[str]:
    """Where the notebooks in `folder` are not those of the sources in `folder`/src; outputs are not compared."""
    sources = {source.stem: source for source in sorted(folder.glob("src/*.py"))}
    found = [f"{path.name} has no source" for path in sorted(folder.glob("*.ipynb")) if path.stem not in sources]
    for name, source in sources.items():
        path = folder / f"{name}.ipynb"
        if not path.exists():
            found.append(f"{path.name} was not generated")
        elif _cells(nbformat.read(path, as_version=4)) != _cells(generate(source)):
            found.append(f"{path.name} is not that of src/{source.name}")
    return found


def build(source: Path) -> Path:
    """Generate, execute and write one notebook. Raises RuntimeError if its outputs have blemishes."""
    notebook = generate(source)
    execute(notebook)
    if found := blemishes(notebook):
        raise RuntimeError("\n".join([f"{source.name} was not written:", *found]))
    path = FOLDER / f"{source.stem}.ipynb"
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Build every notebook, or with `--check` only say which ones are out of date; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate and execute the notebooks from notebooks/src.")
    parser.add_argument("--check", action="store_true", help="compare with the sources, execute nothing")
    if parser.parse_args(argv).check:
        found = out_of_date()
        print("\n".join([*found, "run: make notebooks"] if found else ["the notebooks are those of their sources"]))
        return int(bool(found))
    for source in sorted(FOLDER.glob("src/*.py")):
        path = build(source)
        print(f"notebooks/{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _cells(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    return [(cell.cell_type, cell.get("id", ""), cell.source) for cell in notebook.cells]


if __name__ == "__main__":
    sys.exit(main())
