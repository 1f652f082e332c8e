"""The notebooks are those of their sources, run from top to bottom, and show nothing that a reader should not see."""

import ast
import base64
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import resource
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from minirl_edu.course import exercises
from tests import forked
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("src/*.py"))
LIBRARIES = {"minirl_edu", "IPython", "ipywidgets", "matplotlib", "numpy", "torch", "transformers"}

spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
assert spec is not None and spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

NOTEBOOKS = [build.targets(source)[0] for source in SOURCES]

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER)))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that a notebook's cells put out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in outputs)


def imported(tree: ast.Module) -> set[str]:
    """Top-level packages that a source imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def defined(tree: ast.Module) -> set[str]:
    """Names of functions and classes, at any depth; a variable may well be called `task` or `values`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@functools.cache
def public_names(lab: str = "") -> set[str]:
    """Functions and classes that modules of the library define, methods left out; of the labs' only this one's."""
    found, course = set(), ROOT / "minirl_edu" / "course"
    others = {course / "variants.py", *course.glob("lab[0-9][0-9].py")} - {course / f"lab{lab}.py"}
    for path in set((ROOT / "minirl_edu").rglob("*.py")) - others:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found |= {
            node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        }
    return found


def test_there_are_thirteen_labs():
    assert [source.name[:2] for source in SOURCES] == [f"{number:02d}" for number in range(13)]


def code_lines(cell: str) -> int:
    """Lines of a code cell that a learner reads: not the blank ones, not the marks of a solution."""
    return len([line for line in cell.splitlines() if line.strip() and not re.match(r" *# (?:solution\b|end$)", line)])


@each
def test_a_lab_is_short_and_its_cells_are(source):
    text = source.read_text(encoding="utf-8").partition("\n# %%")[2]  # behind jupytext's header
    assert len([line for line in text.splitlines() if line.strip() and not line.startswith("# %%")]) <= 350
    cells = [cell.source for cell in build._parsed(source).cells if cell.cell_type == "code"]
    assert [cell.splitlines()[0] for cell in cells if code_lines(cell) > 25] == []


@each
def test_a_lab_imports_the_names_of_its_own_module_and_nothing_else(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == [f"from minirl_edu.course.lab{source.name[:2]} import *"]
    assert importlib.import_module(f"minirl_edu.course.lab{source.name[:2]}").__all__


def test_long_cells_are_really_found():
    assert code_lines("a = 1\n\n# solution: a = ...\n# a comment\nb = 2\n# end\n") == 3


def test_the_notebooks_are_those_of_their_sources():
    assert build.out_of_date() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda folder: (folder / "src/00_quickstart.py").write_text("# %%\n1 + 1\n"), "is not that of src/"),
        (lambda folder: (folder / "00_quickstart.ipynb").unlink(), "was not generated"),
        (lambda folder: (folder / "solutions/00_quickstart.md").unlink(), "was not generated"),
        (lambda folder: (folder / "solutions/00_quickstart.md").write_text("# Other"), "is not that of src/"),
        (lambda folder: (folder / "solutions/00_other.ipynb").touch(), "has no source"),
        (lambda folder: (folder / "src/00_quickstart.py").unlink(), "has no source"),
    ],
)
def test_a_notebook_that_lags_behind_is_found(tmp_path, change, complaint):
    for path in ("src/00_quickstart.py", "00_quickstart.ipynb", "solutions/00_quickstart.md"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER / path, tmp_path / path)
    assert build.out_of_date(tmp_path) == []
    change(tmp_path)
    found = build.out_of_date(tmp_path)
    assert found and all(complaint in line for line in found)


SOURCE = """# %% [markdown]
# # A lab
#
# Some text.

# %% [markdown]
# {exercise} 00.1
# What is [twice](../lessons/00_x.md) x?

# %%
def twice(x):
    # solution
    return 2 * x
    # end

# solution: answer = ...
answer = twice(1)
# end
"""


def test_the_student_gets_the_exercise_and_not_the_solution(tmp_path):
    source = tmp_path / "00_x.py"
    source.write_text(SOURCE)
    student, solved = (build.generate(source, solution=solution).cells for solution in (False, True))
    assert student[2].source.startswith("### Exercise 00.1 · ") and "[twice](../lessons/00_x.md)" in student[2].source
    assert solved[2].source == student[2].source
    assert "<details><summary>Hint 1 of " in student[2].source
    assert student[3].source == "def twice(x):\n    raise NotImplementedError  # your turn\n\nanswer = ..."
    assert solved[3].source == "def twice(x):\n    return 2 * x\n\nanswer = twice(1)"
    assert "(solutions/00_x.md)" in student[0].source


def test_the_solutions_are_a_page_of_the_exercises_with_their_solved_cells(tmp_path):
    source = tmp_path / "00_x.py"
    source.write_text(SOURCE)
    page = build.solutions(source)
    assert page.startswith("# A lab: solutions\n") and "[the lab](../00_x.ipynb)" in page
    assert "\n## Exercise 00.1 · " in page and "Hint" not in page
    assert "What is [twice](../../lessons/00_x.md) x?" in page  # the page lies a folder deeper than the lab
    assert page.endswith("```python\ndef twice(x):\n    return 2 * x\n\nanswer = twice(1)\n```\n")
    source.write_text("# %%\n1 + 1\n")
    assert build.solutions(source) == ""


def test_a_step_of_the_capstone_is_what_its_page_says(tmp_path):
    source = tmp_path / "00_x.py"
    source.write_text("# %% [markdown]\n# {capstone} 04\n")
    text = build.generate(source).cells[1].source
    page = (ROOT / "lessons" / "capstone.md").read_text(encoding="utf-8")
    assert text in page and "`update(policy, optimizer, rollout, size, micro_batch" in text
    assert text.count("<details>") == text.count("</details>") > 0 and not re.search(r"^#", text, re.MULTILINE)
    with pytest.raises(ValueError, match="the steps 01, 02, 03, 04, 05, 06, 07, 08"):
        build.capstone("09")


def figure_cell(size: tuple[int, int], width: int | None) -> nbformat.NotebookNode:
    """A cell that shows coloured noise as PNG, `width` pixels wide on the page."""
    noise = np.random.default_rng(0).integers(0, 200, (size[1], size[0], 4), dtype=np.uint8)
    noise[..., 3] = 255
    noise[:, :20] = 0  # a transparent margin: white on the page
    buffer = io.BytesIO()
    Image.fromarray(noise, "RGBA").save(buffer, format="png")
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    metadata = {} if width is None else {"image/png": {"width": width}}
    cell = nbformat.v4.new_code_cell("figure")
    cell.outputs = [nbformat.v4.new_output("display_data", data=data, metadata=metadata)]
    return cell


def picture(output: nbformat.NotebookNode) -> Image.Image:
    """The PNG of an output."""
    return Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))


@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [((400, 200), 200, (300, 150)), ((250, 100), 200, (250, 100)), ((400, 200), None, (400, 200))],
)
def test_figures_are_kept_at_the_sharpness_of_a_screen_and_in_few_colours(size, width, expected):
    notebook = nbformat.v4.new_notebook(cells=[figure_cell(size, width)])
    build.shrink_figures(notebook)
    image = picture(notebook.cells[0].outputs[0])
    assert image.size == expected and image.mode == "P" and len(image.getcolors() or range(999)) <= 64
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@each
def test_the_students_notebook_waits_for_every_answer(source):
    numbers = exercises(source.name[:2])
    assert marks_in(read(build.targets(source)[0])) == [("○", number) for number in numbers]
    assert re.findall(r"^## Exercise (\S+)", build.solutions(source), re.MULTILINE) == list(numbers)


@each_notebook
def test_a_notebook_has_its_outputs_and_no_blemish(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # run once, from top to bottom
    pictures = [picture(output) for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 3
    assert all(len(image.getcolors() or range(999)) <= 64 for image in pictures)  # `build` made them small
    assert build.blemishes(notebook) == []
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|Users|tmp)/", text)  # whoever built it, wherever
    assert len(text) < 6e5
    assert f"src/{path.stem}.py" in notebook.cells[0].source


def marks_in(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What `check` printed, in order: right (✓), wrong (✗) or still open (○), and the number of the exercise."""
    return re.findall(r"^([✓✗○]) (\d\d\.\d+): ", printed(notebook), re.MULTILINE)


@each_notebook
def test_a_notebook_keeps_nothing_that_changes_from_build_to_build(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_blemishes_are_really_found():
    cell = nbformat.v4.new_code_cell("f()")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=f"saved to {ROOT}/runs"),
        nbformat.v4.new_output("stream", name="stderr", text="a progress bar"),
        nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]),
        nbformat.v4.new_output("execute_result", data={"text/plain": f"{Path.home()}/x"}),
        nbformat.v4.new_output("execute_result", data={"text/plain": "42"}),
    ]
    found = " ".join(build.blemishes(nbformat.v4.new_notebook(cells=[cell])))
    for part in (f"shows the path {ROOT}", "a progress bar", "ValueError: no", f"shows the path {Path.home()}"):
        assert part in found
    assert "42" not in found


@each
def test_a_notebook_imports_only_the_library_and_scientific_packages(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert imported(tree) - LIBRARIES - set(sys.stdlib_module_names) == set()
    assert "minirl_edu" in imported(tree)


@each
def test_a_notebook_redefines_no_public_name_of_the_library(source):
    assert defined(ast.parse(source.read_text(encoding="utf-8"))) & public_names(source.name[:2]) == set()


def test_a_redefinition_would_be_found():
    tree = ast.parse("def minirl_loss(): ...\nkl_k3 = lambda x: x\nfor values in (): ...\nclass HFEngine: ...")
    assert defined(tree) & public_names() == {"minirl_loss", "kl_k3", "HFEngine"}


def test_the_quickstart_shows_what_its_text_says():
    """The prose quotes no numbers, but it says which way they go; the outputs that are shipped must agree."""
    text = printed(read(FOLDER / "00_quickstart.ipynb"))
    before, after = map(float, re.findall(r"held-out score \| ([\d.]+) \| ([\d.]+)", text)[0])
    error = float(re.findall(r"standard error of ([\d.]+)", text)[0])
    assert after > before + 3 * error
    entropy, last_entropy = map(float, re.findall(r"token entropy, nats \| ([\d.]+) \| ([\d.]+)", text)[0])
    assert last_entropy < entropy
    dial = re.findall(r"^\| (\w+) \| (\S+e\S+) \| (\S+e\S+) \| (?:(-?\d+) %)? ?\| ([\d.]+)% \|$", text, re.MULTILINE)
    rows = {name: (float(kl), int(removed or 0), float(flips)) for name, kl, _, removed, flips in dial}
    assert rows["fp32"] == (0.0, 0, 0.0)
    by_bits = ["fp32", "bf16", "int8", "int6", "int5", "int4", "int3"]
    for column in (0, 2):  # the fewer the bits, the larger the KL and the flip rate
        values = [rows[name][column] for name in by_bits]
        assert values == sorted(values) and len(set(values)) == len(values)
    assert min(rows[name][1] for name in ("fp8_e4m3", "int8")) >= 10  # percent of the KL that R3 removes
    assert max(abs(rows[name][1]) for name in ("int5", "int4", "int3")) < 10
    assert int(re.findall(r"flips in this response: (\d+)", text)[0]) > 0


def test_lab_12_gives_the_verdicts_of_the_page():
    """With the solutions of its exercises; and it says which one hangs on the choice of an interval."""
    text = printed(read(FOLDER / "12_evidence.ipynb"))
    agreed = re.search(r"(\d+) of (\d+) verdicts are those of CLAIMS.md", text)
    assert agreed and agreed[1] == agreed[2] and int(agreed[1]) >= 25
    assert re.findall(r"^(\S+): (\w+) → (\w+)\.", text, re.MULTILINE) == [("F3a-experts", "inconclusive", "reproduced")]


RUNS = [
    *((source, "forked") for source in SOURCES[:-1]),
    (SOURCES[-1], "started"),
    *(pytest.param(source, "started", marks=pytest.mark.nightly) for source in SOURCES[:-1]),
]


@pytest.fixture
def kernels(request, monkeypatch):
    """Kernels are forked from a process that has their libraries loaded, or started as `make notebooks` starts them."""

    def fork(command: list[str], *, env: dict[str, str], cwd: str, **_: object) -> Forked:
        module = command.index("-m") + 1
        with contextlib.chdir(cwd):
            return Forked(f"-m {command[module]}", command[module + 1 :], environment=env)

    if request.param == "forked":
        monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", fork)
    return request.param


def cpu_seconds(kernels: str) -> float:
    """Processor time of all child processes that have ended, in seconds."""
    if kernels == "forked":
        return forked.cpu_seconds()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kernels"), RUNS, indirect=["kernels"], ids=lambda value: getattr(value, "stem", value)
)
def test_a_lab_runs_in_under_a_minute_and_its_solutions_are_right(source, kernels, monkeypatch):
    """In the fast setting, with its exercises solved."""
    monkeypatch.setenv("MINIRL_LABS", "fast")
    notebook = build.generate(source, solution=True)
    started = cpu_seconds(kernels)
    build.execute(notebook, timeout=240)
    # The kernel's own time: by the clock, a busy machine has been seen to take six times as long as a quiet one.
    seconds = cpu_seconds(kernels) - started
    assert build.blemishes(notebook) == []
    assert marks_in(notebook) == [("✓", number) for number in exercises(source.name[:2])]
    assert seconds > 1  # it was counted at all
    assert seconds < 60
