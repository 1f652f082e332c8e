"""`lessons/TEACHING.md`: its minutes are those of the exercises, its commands and names exist, its links lead on."""

import ast
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirl_edu.archives import files_in
from minirl_edu.course import exercises, mystery

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "lessons"
PAGE = (LESSONS / "TEACHING.md").read_text(encoding="utf-8")
WORDS_A_MINUTE, PENCIL_MINUTES, IMPORTANT = 100, 5, 4
UNITS = {path.name[:2]: path for path in sorted(LESSONS.glob("[0-9][0-9]_*.md"))}


def section(title: str) -> str:
    found = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def table(text: str) -> list[list[str]]:
    """The cells of a section's first table, line by line, without its header."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def block(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def minutes(unit: str, least: int = 0) -> int:
    """Of the unit's exercises of this importance or more."""
    return sum(exercise.minutes for exercise in exercises(unit).values() if exercise.importance >= least)


def reading(unit: str) -> int:
    lesson = UNITS[unit].read_text(encoding="utf-8")
    lab = (ROOT / "notebooks" / "src" / f"{UNITS[unit].stem}.py").read_text(encoding="utf-8")
    cells = re.findall(r"^# %% \[markdown\]\n((?:#.*\n)*)", lab, re.MULTILINE)
    words = [word for line in "".join(cells).splitlines() for word in line[1:].split()]
    return round((len(lesson.split()) + len(words)) / WORDS_A_MINUTE)


def shown() -> dict[str, list[str]]:
    return {unit: cells for unit, *cells in table(section("Minutes"))}


def total(units: str, column: int) -> int:
    return sum(int(shown()[unit][column]) for unit in units.split(", "))


def test_the_minutes_are_those_of_the_exercises():
    assert list(shown()) == [*UNITS, "all"]
    for unit, lesson in UNITS.items():
        read, every, important, optional, pencil = shown()[unit]
        assert int(every) == minutes(unit), unit
        assert int(important) == minutes(unit, IMPORTANT), unit
        low = [exercise.id for exercise in exercises(unit).values() if exercise.importance < IMPORTANT]
        assert optional == ", ".join(low), unit
        assert int(pencil) == PENCIL_MINUTES * lesson.read_text(encoding="utf-8").count("<details>"), unit
        assert abs(int(read) - reading(unit)) <= 5, unit  # a lesson may change by 500 words


def test_the_totals_are_sums():
    read, every, important, optional, pencil = shown()["all"]
    for column, value in ((0, read), (1, every), (2, important), (4, pencil)):
        assert int(value) == total(", ".join(UNITS), column)
    low = sum(len(cells[3].split(", ")) for unit, cells in shown().items() if unit != "all" and cells[3])
    assert optional == f"{low} of {sum(len(exercises(unit)) for unit in UNITS)}"
    hours = [f"{n // 60} h {n % 60} min" for n in (int(read) + int(every), int(read) + int(every) + int(pencil))]
    assert f"That is {hours[0]}, and {hours[1]} with the pencil exercises." in PAGE


def test_the_day_lists_exercises_with_their_minutes_and_says_when_it_ends():
    *rows, (_, explained, count, summed) = table(section("One day"))
    found = []
    for unit, _, ids, stated in rows:
        asked = [exercises(unit)[name] for name in ids.split(", ")]
        assert int(stated) == sum(exercise.minutes for exercise in asked), unit
        found += asked
    assert int(explained) == sum(int(row[1]) for row in rows)
    assert (count, int(summed)) == (f"{len(found)} exercises", sum(exercise.minutes for exercise in found))
    end = 9 * 60 + int(explained) + int(summed) + 60 + 3 * 15  # lunch, breaks
    assert f"from 9:00 to {end // 60}:{end % 60:02d}" in PAGE


def test_the_weeks_hold_all_units_once_and_their_minutes():
    weeks = table(section("Five weeks"))
    assert ", ".join(row[1] for row in weeks) == ", ".join(UNITS)
    for _, units, read, every, _ in weeks:
        assert [int(read), int(every)] == [total(units, 0), total(units, 1)], units
    homework = [int(read) + int(every) for _, _, read, every, _ in weeks]
    saved = total(", ".join(UNITS), 1) - total(", ".join(UNITS), 2)
    for number in (homework[0], homework[-1], saved):
        assert f"{number // 60} h {number % 60} min" in " ".join(section("Five weeks").split())
    ((_, units, read, important),) = table(section("Alone"))
    assert [int(read), int(important)] == [total(units, 0), total(units, 2)]
    assert f"{(n := int(read) + int(important)) // 60} h {n % 60} min in all" in section("Alone")


def test_the_self_test_has_ten_questions_with_answers():
    text = section("Before the course")
    assert re.findall(r"^\*\*(\d+)\.\*\* ", text, re.MULTILINE) == [str(number) for number in range(1, 11)]
    assert text.count("<details><summary>Answer</summary>\n\n") == text.count("\n\n</details>") == 10


def test_the_assignments_names_are_those_of_the_model_solution():
    solution = ast.parse((LESSONS / "nano_minirl.py").read_text(encoding="utf-8"))
    functions = {node.name: ast.dump(_bare(node)) for node in solution.body if isinstance(node, ast.FunctionDef)}
    (rollout,) = [node for node in solution.body if isinstance(node, ast.ClassDef)]
    (source,) = block(section("An assignment"), "python")
    constants, *asked = ast.parse(source).body
    for node in asked:
        if isinstance(node, ast.FunctionDef):
            assert ast.dump(_bare(node)) == functions[node.name], node.name
        else:
            assert isinstance(node, ast.ClassDef) and node.name == rollout.name
            fields = [field.target for field in rollout.body if isinstance(field, ast.AnnAssign)]
            assert ast.unparse(node.body[0]) == f"({', '.join(map(ast.unparse, fields))})"
    assigned = {name.id for node in ast.walk(solution) if isinstance(node, ast.Assign) for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}  # fmt: skip
    assert {node.id for node in ast.walk(constants) if isinstance(node, ast.Name)} <= assigned
    tests = (ROOT / "tests" / "lessons" / "test_nano_minirl.py").read_text(encoding="utf-8")
    used = set(re.findall(r"\bnano\.(\w+)", tests)) - {"random"}
    assert used <= {node.id for node in ast.walk(constants) if isinstance(node, ast.Name)} | {
        node.name for node in asked if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def _bare(node: ast.FunctionDef) -> ast.arguments:
    """Its arguments without annotations."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return node.args


def test_each_test_of_the_assignment_belongs_to_one_step():
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests/lessons/test_nano_minirl.py").read_text("utf-8"), re.M)
    lines = re.search(r"\| step \|.*\n\|[-|]+\n((?:\|.*\n)+)", section("An assignment"))
    assert lines is not None
    chosen = [cell.strip("` ") for line in lines[1].splitlines() for cell in [line.strip("|").split("|")[-1]]]
    patterns = [word for cell in chosen if "by hand" not in cell for word in cell.split(" or ")]
    assert [name for name in tests if sum(pattern in name for pattern in patterns) != 1] == []
    assert [pattern for pattern in patterns if not any(pattern in name for name in tests)] == []


def test_the_points_of_the_rubric_add_up_to_100():
    lines = re.search(r"\| points \|.*\n\|[-|]+\n((?:\|.*\n)+)", section("An assignment"))
    assert lines is not None
    assert sum(int(line.strip("|").split("|")[0]) for line in lines[1].splitlines()) == 100


def test_the_class_exercise_runs(tmp_path, monkeypatch):
    """Its commands, with the training left out: a stored chart is what a recording gives."""
    monkeypatch.chdir(tmp_path)
    stored = files_in(LESSONS / "results" / "mystery")["B/seed0.csv"].replace(b'"seed": 0', b'"seed": 11')
    recorded = []

    def rerun(name: str, out: str | Path, *, seed: int) -> Path:
        recorded.append((name, seed))
        path = Path(out) / name / f"seed{seed}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored)
        return path

    monkeypatch.setattr(mystery, "rerun", rerun)
    own, of_teacher = block(section("Diagnose your neighbour's run"), "sh")
    record, copy = own.strip().splitlines()
    _, option, code = shlex.split(record)
    assert option == "-c"
    exec(code, {})
    assert recorded == [("B", 11)]
    make, _, source, destination = re.fullmatch(r"mkdir -p (\S+) && (cp) (\S+) (\S+)", copy).groups()  # pyright: ignore
    Path(make).mkdir(parents=True)
    shutil.copy(source, destination)
    Path("build/for_my_neighbour").rename("build/received")
    (cell,) = block(section("Diagnose your neighbour's run"), "python")
    drawn = []
    names = {
        **{"read_charts": mystery.read_charts, "checkout": lambda: tmp_path, "to_png": drawn.append},
        **{"chart_sheet": lambda chart, name: (chart, name), "Image": lambda data, width: SimpleNamespace(data=data)},
    }
    exec(cell, names)
    ((chart, name),) = drawn
    assert set(chart) == set(mystery.COLUMNS) and name == "my neighbour's run"

    recorded.clear()
    _, _, module, *arguments = shlex.split(of_teacher)
    assert module == mystery.__name__ and mystery.main(arguments) == 0
    assert recorded == [(name, 0) for name in (mystery.HEALTHY, *mystery.FAULTS)]


def test_what_the_cell_uses_is_in_lab_10():
    lab = (ROOT / "notebooks" / "src" / "10_diagnosing_collapse.py").read_text(encoding="utf-8")
    (cell,) = block(section("Diagnose your neighbour's run"), "python")
    defined = {
        alias.name for node in ast.walk(ast.parse(lab)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    defined |= {node.name for node in ast.walk(ast.parse(lab)) if isinstance(node, ast.FunctionDef)}
    called = set(re.findall(r"\b(\w+)\(", cell))
    assert called == {"read_charts", "checkout", "Image", "to_png", "chart_sheet"} and called <= defined


@pytest.mark.parametrize("page", ["TEACHING.md", "cheat_sheet.md"])
def test_the_links_lead_somewhere(page):
    text = (LESSONS / page).read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [file for file, _, _ in links if file and not (LESSONS / file).exists()] == []
    assert {anchor for file, _, anchor in links if not file} <= anchors
    assert f"]({page})" in (LESSONS / "README.md").read_text(encoding="utf-8")
