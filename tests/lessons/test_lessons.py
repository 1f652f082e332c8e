"""The lessons have one skeleton, fit their labs, and every labelled equation in them is proved."""

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.md"))
SKELETON = (
    *("The question", "Quick facts", "Key equations", "Derivation", "The code", "You should know", "Pencil exercises"),
    *("Common confusions", "Further reading"),
)
# A display equation, and the label that MyST reads behind it: $$ … $$ (02-remainder)
EQUATION = re.compile(r"^\$\$(.+?)\$\$[ ]*(?:\(([\w-]+)\))?[ ]*$", re.MULTILINE | re.DOTALL)
NUMBERED = re.compile(r"^#{2,3} (\d+ · .+)$", re.MULTILINE)

each = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def lab_of(lesson: Path) -> Path:
    """The source of the lab with the lesson's number and name."""
    return ROOT / "notebooks" / "src" / f"{lesson.stem}.py"


def markdown_of(lab: Path) -> str:
    """The Markdown cells of a lab's source."""
    lines = lab.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#"))


def checks_of(lesson: Path) -> ModuleType:
    """The module NN_checks.py beside a lesson."""
    path = lesson.with_name(f"{lesson.name[:2]}_checks.py")
    spec = importlib.util.spec_from_file_location(f"checks_{lesson.name[:2]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks(module: ModuleType) -> dict[str, Callable[[], None]]:
    """Its checks by the label of the equation: `check_02_remainder` proves 02-remainder."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name[6:].replace("_", "-"): function for name, function in functions if name.startswith("check_")}


def equations(lesson: Path) -> list[tuple[str, str]]:
    """Display equations and their labels, "" where one has none."""
    return [(body, label) for body, label in EQUATION.findall(lesson.read_text(encoding="utf-8"))]


def test_there_are_thirteen_units():
    assert [path.name[:2] for path in LESSONS] == [f"{number:02d}" for number in range(13)]


@each
def test_a_lesson_is_short(lesson):
    lines = lesson.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_what_our_runs_say_is_in_unit_12_alone():
    """No verdict stands in two places. The others link to it."""
    pages = [*LESSONS[:12], *map(lab_of, LESSONS[:12]), *(ROOT / "minirl_edu" / "course").glob("*[01][0-9].py")]
    others = [path for path in pages if "12" not in path.stem]
    word = re.compile(r"CLAIMS|\*(?:reproduced|opposite|inconclusive)\*")
    assert [path.name for path in others if word.search(path.read_text(encoding="utf-8"))] == []


def test_the_table_of_lesson_12_is_that_of_the_claims():
    """Row by row and column by column, without the links."""
    mine = re.findall(r"^\| (F\d\w?) [^|]+\|(.+)\|$", LESSONS[12].read_text(encoding="utf-8"), re.MULTILINE)
    page = (ROOT / "lessons" / "results" / "CLAIMS.md").read_text(encoding="utf-8")
    side = re.search(r"^\| finding \| .*\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert side is not None and len(mine) == len(side[1].splitlines()) == 9
    for (claim, cells), line in zip(mine, side[1].splitlines(), strict=True):
        assert f"#{claim.lower()})" in line  # its first column
        theirs = [re.sub(r"\*| \(\[.*", "", cell).strip() for cell in line.strip("|").split("|")[1:]]
        assert [cell.strip() for cell in cells.split("|")] == theirs, claim


def test_the_numbers_of_lesson_12_are_those_of_the_claims():
    text = " ".join(LESSONS[12].read_text(encoding="utf-8").split())
    page = (ROOT / "lessons" / "results" / "CLAIMS.md").read_text(encoding="utf-8")

    def effect(claim: str, criterion: str) -> str:
        rows = page.partition(f"\n### {claim}\n")[2].partition("\n### ")[0].splitlines()
        (row,) = (line for line in rows if criterion in line)
        return row.split(" | ")[2].replace("−", "").replace("+", "").replace(" points", "").removeprefix("× ")

    for claim, criterion, quoted in (
        ("F1a", "*MiniRL* above *− IS*", "ends {} points ({}) *below*"),
        ("F1-longer", "*MiniRL* above *− IS*", "MiniRL ends {} points ({}) above − IS"),
        ("F1b-longer", "*MiniRL* above *+ length norm*", "by {} points, {}; four seeds)"),
        ("F1d-experts", "*R3* not above *MiniRL*", "({}, {})"),
    ):
        estimate, low, high = re.findall(r"[\d.]+", effect(claim, criterion))
        low, high = sorted((low, high), key=float)
        assert quoted.format(estimate, f"{low} to {high}") in text, claim
    assert "6 of 8" in effect("F1-longer", "*− IS* collapse") and "6 of 8 runs collapsed" in text
    estimate, low, high = re.findall(r"[\d.]+", effect("F1-longer", "entropy in the last third"))
    assert f"ratio is {float(estimate):.2f} ({low} to {high})" in text
    (count,) = re.findall(r"for all (\d+) criteria", page)
    assert f"Our {count} criteria" in text


@each
def test_a_lesson_has_the_skeleton_and_opens_with_a_picture(lesson):
    text = lesson.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert tuple(headings) == SKELETON
    opening = text.partition("## The question")[0]
    assert "**A picture to keep: " in opening


@each
def test_a_lesson_and_its_lab_agree_and_are_linked(lesson):
    text, lab = lesson.read_text(encoding="utf-8"), markdown_of(lab_of(lesson))
    titles = [re.search(r"^# (.+)$", page, re.MULTILINE) for page in (text, lab)]
    assert titles[0] and titles[1] and titles[0][1] == titles[1][1]
    assert f"(../notebooks/{lesson.stem}.ipynb)" in text
    assert f"(../lessons/{lesson.name})" in lab
    assert NUMBERED.findall(text) == NUMBERED.findall(lab) != []


@each
def test_every_equation_has_a_label_a_number_and_a_check(lesson):
    found = equations(lesson)
    assert len(found) >= 3
    assert [body for body, label in found if not label] == []
    assert [label for body, label in found if r"\tag{" not in body] == []  # the paper's number, or the lesson's own
    labels = [label for _, label in found]
    assert all(label.startswith(f"{lesson.name[:2]}-") for label in labels)
    assert len(set(labels)) == len(labels)
    proved = checks(checks_of(lesson))
    assert set(labels) - set(proved) == set()
    assert set(proved) - set(labels) == set()
    assert [label for label, check in proved.items() if not check.__doc__] == []


@pytest.mark.parametrize(
    ("lesson", "label"),
    [(lesson, label) for lesson in LESSONS for _, label in equations(lesson)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_labelled_equation_holds(lesson, label):
    checks(checks_of(lesson))[label]()


def test_equations_and_labels_are_really_found():
    text = "$$\na = b \\tag{1}\n$$ (02-first)\n\ntext $x$ and\n\n$$c$$\n"
    assert EQUATION.findall(text) == [("\na = b \\tag{1}\n", "02-first"), ("c", "")]
    assert NUMBERED.findall("## 1 · By hand\n# %%\n### 2 · Then\n## The code\n") == ["1 · By hand", "2 · Then"]


@each
def test_the_links_of_a_lesson_lead_somewhere(lesson):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", lesson.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (lesson.parent / link).exists()] == []


def test_the_corrections_in_lesson_05_have_the_numbers_that_were_measured():
    def rows(path: Path) -> dict[str, list[str]]:
        table = re.findall(r"^\| (.+) \|$", path.read_text(encoding="utf-8"), re.MULTILINE)
        cells = [line.split(" | ") for line in table]
        return {
            name: numbers[:2] for name, *numbers in cells if numbers and re.fullmatch(r"[-+][\d.]+ ± .*", numbers[0])
        }

    shown, measured = rows(LESSONS[5]), rows(ROOT / "lessons" / "results" / "worlds" / "README.md")
    assert len(shown) == len(measured) == 7
    assert shown == measured
