"""`lessons/TEACHING.md`: its minutes are those of the exercises, its commands and names exist, its links lead on.

`python -m tests.course.test_teaching` writes the minutes anew, there and in README.md: the tables with their sums, and
the sentences that quote them. Which exercises are in the plan of a day, and which units in which week, stays as it is.
"""

import ast
import importlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirl_edu.archives import files_in
from minirl_edu.course import exercises, find, mystery

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "lessons"
TEACHING, README = LESSONS / "TEACHING.md", ROOT / "README.md"
PAGE = TEACHING.read_text(encoding="utf-8")
WORDS_A_MINUTE, PENCIL_MINUTES, IMPORTANT, ROUNDED = 100, 5, 4, 5
UNITS = {path.name[:2]: path for path in sorted(LESSONS.glob("[0-9][0-9]_*.md"))}


def section(title: str, page: str = PAGE) -> str:
    found = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def table(text: str) -> list[list[str]]:
    """The cells of a section's first table, line by line, without its header."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def block(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------------- the minutes


def minutes(unit: str, least: int = 0) -> int:
    """Of the unit's exercises of this importance or more."""
    return sum(exercise.minutes for exercise in exercises(unit).values() if exercise.importance >= least)


def reading(unit: str) -> int:
    """Of the lesson and of the lab's Markdown, to five minutes: they are estimates, and a word changes often."""
    lesson = UNITS[unit].read_text(encoding="utf-8")
    lab = (ROOT / "notebooks" / "src" / f"{UNITS[unit].stem}.py").read_text(encoding="utf-8")
    cells = re.findall(r"^# %% \[markdown\]\n((?:#.*\n)*)", lab, re.MULTILINE)
    words = [word for line in "".join(cells).splitlines() for word in line[1:].split()]
    return ROUNDED * round((len(lesson.split()) + len(words)) / WORDS_A_MINUTE / ROUNDED)


def pencil(unit: str) -> int:
    return PENCIL_MINUTES * UNITS[unit].read_text(encoding="utf-8").count("<details>")


def total(count: Callable[[str], int], units: Iterable[str] = tuple(UNITS)) -> int:
    return sum(map(count, units))


def important(unit: str) -> int:
    return minutes(unit, IMPORTANT)


def hours(n: int) -> str:
    return f"{n // 60} h {n % 60} min"


def of_all_units() -> list[list[str]]:
    """The table of minutes: unit, reading, exercises, those without the optional, the optional, pencil."""
    rows, optional = [], 0
    for unit in UNITS:
        low = [exercise.id for exercise in exercises(unit).values() if exercise.importance < IMPORTANT]
        optional += len(low)
        numbers = [str(count(unit)) for count in (reading, minutes, important)]
        rows.append([unit, *numbers, ", ".join(low), str(pencil(unit))])
    sums = [str(total(count)) for count in (reading, minutes, important)]
    count = total(lambda unit: len(exercises(unit)))
    return [*rows, ["all", *sums, f"{optional} of {count}", str(total(pencil))]]


def of_the_day(rows: list[list[str]]) -> list[list[str]]:
    """Rows of unit, minutes of explanation, exercises: with the minutes of the exercises, and sums."""
    asked = [[find(name) for name in ids.split(", ")] for _, _, ids, _ in rows[:-1]]
    summed = [sum(exercise.minutes for exercise in found) for found in asked]
    explained = sum(int(row[1]) for row in rows[:-1])
    own = [[unit, told, ids, str(n)] for (unit, told, ids, _), n in zip(rows[:-1], summed, strict=True)]
    return [*own, ["all", str(explained), f"{sum(map(len, asked))} exercises", str(sum(summed))]]


def of_the_weeks(rows: list[list[str]]) -> list[list[str]]:
    """Rows of week, units, …, what is done in class: with the minutes of these units."""
    return [
        [week, units, *(str(total(count, units.split(", "))) for count in (reading, minutes)), task]
        for week, units, _, _, task in rows
    ]


def of_the_core(rows: list[list[str]]) -> list[list[str]]:
    """The path for one weekend: reading, and exercises without the optional."""
    ((path, units, *_),) = rows
    return [[path, units, *(str(total(count, units.split(", "))) for count in (reading, important))]]


def rewritten(page: str) -> str:
    """The page of a teacher with all minutes computed anew."""
    day = of_the_day(table(section("One day", page)))
    weeks = of_the_weeks(table(section("Five weeks", page)))
    core = of_the_core(table(section("Alone", page)))
    tables = {"Minutes": of_all_units(), "One day": day, "Five weeks": weeks, "Alone": core}
    for title, rows in tables.items():
        text = section(title, page)
        lines = re.search(r"^\|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert lines is not None, title
        body = "".join("| " + " | ".join(row).replace("|  |", "| |") + " |\n" for row in rows)
        page = page.replace(text, text[: lines.start(1)] + body + text[lines.end(1) :])
    end = 9 * 60 + int(day[-1][1]) + int(day[-1][3]) + 60 + 3 * 15  # lunch, breaks
    homework = [int(read) + int(every) for _, _, read, every, _ in weeks]
    both = total(reading) + total(minutes)
    quoted = {
        r"(That is ){}(, and ){}( with the)": (hours(both), hours(both + total(pencil))),
        r"(lasts from 9:00 to )\d+:\d\d()": (f"{end // 60}:{end % 60:02d}",),
        r"(Homework is between ){}( and ){}( a week)": (hours(min(homework)), hours(max(homework))),
        r"(optional exercises saves ){}( over)": (hours(total(minutes) - total(important)),),
        r"(leave out what is optional, ){}( in all)": (hours(int(core[0][2]) + int(core[0][3])),),
    }
    return _quote(page, quoted)


def readme(text: str) -> str:
    """README.md with its count of units, exercises and hours."""
    count, every = total(lambda unit: len(exercises(unit))), total(minutes)
    together = total(reading) + every
    quoted = {
        r"(It takes about )\S+( hours a unit)": (f"{round(together / 30 / len(UNITS)) / 2:g}",),
        r"(of these )\d+( hours, the )\d+( exercises of the labs take )\d+()": (
            *(f"{together / 60:.0f}", str(count), f"{every / 60:.0f}"),
        ),
    }
    return _quote(text, quoted)


def _quote(text: str, quoted: dict[str, tuple[str, ...]]) -> str:
    """The text with new numbers between the words that each pattern keeps; a space in a pattern may be a line's end."""
    for pattern, numbers in quoted.items():
        sought = pattern.replace("{}", r"\d+ h \d+ min").replace(" ", r"\s+")
        found = re.findall(sought, text)
        assert len(found) == 1, f"{pattern}: expected once, found {len(found)} times"
        words = [found[0]] if isinstance(found[0], str) else list(found[0])
        new = words[0] + "".join(number + word for number, word in zip(numbers, words[1:], strict=True))
        text = re.sub(sought, lambda _, new=new: new, text)
    return text


def main() -> None:
    """Write both pages with the minutes as they are now."""
    TEACHING.write_text(rewritten(PAGE), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


HOW = "write them anew: python -m tests.course.test_teaching"


def test_the_minutes_are_those_of_the_exercises():
    assert rewritten(PAGE) == PAGE, HOW
    text = README.read_text(encoding="utf-8")
    assert readme(text) == text, HOW


def test_a_change_of_minutes_is_noticed_and_corrected():
    changed = PAGE.replace("| all | ", "| all | 9", 1)
    assert changed != PAGE and rewritten(changed) == rewritten(PAGE)
    assert table(section("Minutes"))[0][2] == str(sum(one.minutes for one in exercises("00").values()))
    with pytest.raises(AssertionError, match="expected once, found 0 times"):
        rewritten(PAGE.replace("That is", "It is"))


def test_the_weeks_hold_all_units_once_and_in_order():
    assert ", ".join(row[1] for row in table(section("Five weeks"))) == ", ".join(UNITS)


def test_the_self_test_has_ten_questions_with_answers():
    text = section("Before the course")
    assert re.findall(r"^\*\*(\d+)\.\*\* ", text, re.MULTILINE) == [str(number) for number in range(1, 11)]
    assert text.count("<details><summary>Answer</summary>\n\n") == text.count("\n\n</details>") == 10


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
    lab = ast.parse((ROOT / "notebooks" / "src" / "10_diagnosing_collapse.py").read_text(encoding="utf-8"))
    (cell,) = block(section("Diagnose your neighbour's run"), "python")
    imports = [node for node in ast.walk(lab) if isinstance(node, ast.ImportFrom)]
    defined = {alias.name for node in imports for alias in node.names}
    stars = [str(node.module) for node in imports if node.names[0].name == "*"]
    defined |= {name for module in stars for name in importlib.import_module(module).__all__}
    defined |= {node.name for node in ast.walk(lab) if isinstance(node, ast.FunctionDef)}
    called = set(re.findall(r"\b(\w+)\(", cell))
    assert called == {"read_charts", "checkout", "Image", "to_png", "chart_sheet"} and called <= defined


@pytest.mark.parametrize("page", ["TEACHING.md", "cheat_sheet.md"])
def test_the_links_lead_somewhere(page):
    text = (LESSONS / page).read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [file for file, _, _ in links if file and "://" not in file and not (LESSONS / file).exists()] == []
    assert {anchor for file, _, anchor in links if not file} <= anchors
    assert f"]({page})" in (LESSONS / "README.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
