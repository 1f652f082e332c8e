"""A deck of HTML slides for each unit, made from its lesson. `build.py` calls it; nothing here asks the network.

A deck has the lesson's picture and question; for each step of the derivation its equations, each with the sentence that
leads to it, and its figures with their captions; what one should know; and the pencil exercises, each with its answer
below it. The full text of a step is in the speaker's notes (the key S). reveal.js comes from the package
sphinx-revealjs.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

FIGURE = re.compile(r"^!\[([^\]]*)\]\(([^)]+)\)(?:\n+\*([^*\n].*?)\*$)?", re.MULTILINE | re.DOTALL)
EQUATION = re.compile(r"^\$\$\n.*?^\$\$[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\([^)\s]+\)")
EXERCISE = re.compile(r"(.*?)<details><summary>Answer</summary>(.*?)</details>", re.DOTALL)
NUMBER = re.compile(r"^(?:\*\*\d+\.\*\*|\d+\.) ")
SENTENCE = re.compile(r"(?<=[.?!])\**\)? (?=[A-Z*$(])")
EQUATIONS_ON_A_SLIDE = 2


def deck(lesson: str, unit: str) -> str:
    """The Markdown of a unit's deck, whose first two levels of headings are its two directions, across and down."""
    lesson = LINK.sub(r"\1", lesson)
    title, _, rest = lesson.removeprefix("# ").partition("\n")
    parts = _sections(rest, "## ")
    picture = re.search(r"^\*\*A picture to keep: (.+?)\.?\*\* (.*?)\n\n", rest, re.MULTILINE | re.DOTALL)
    slides = [f"# {unit} · {title.strip()}"]
    if picture:
        slides.append(f"## {_capital(picture[1])}\n\n{_sentences(picture[2], 2)}\n\n{_notes(picture[2])}")
    if question := parts.get("The question"):
        slides.append(f"## The question\n\n{question}")
    slides += _drawn("The idea", rest.partition("\n## Derivation")[0])
    for heading, text in _sections(parts["Derivation"], "### ").items():
        slides += _step(heading, text)
    slides.append(f"## You should know\n\n{parts['You should know']}")
    for number, (asked, answer) in enumerate(EXERCISE.findall(parts["Pencil exercises"]), start=1):
        asked = NUMBER.sub("", asked.strip())
        slides.append(f"## With a pencil, {number}\n\n{asked}\n\n### Answer {number}\n\n{answer.strip()}")
    return "\n\n".join(slides) + "\n"


def _step(heading: str, text: str) -> list[str]:
    """The slides of one step of a derivation."""
    pieces = EQUATION.split(FIGURE.sub("", text))
    equations = [
        f"{_last(before)}\n\n{equation}" for before, equation in zip(pieces[:-1], EQUATION.findall(text), strict=True)
    ]
    groups = [equations[i : i + EQUATIONS_ON_A_SLIDE] for i in range(0, len(equations), EQUATIONS_ON_A_SLIDE)]
    groups = groups or [[_sentences(pieces[0].strip(), 3)]]
    slides = ["\n\n".join([f"## {heading}", *groups[0], _notes(text)])]
    slides += ["\n\n".join([f"### {heading}, continued", *group]) for group in groups[1:]]
    return slides + _drawn(heading, text)


def _drawn(heading: str, text: str) -> list[str]:
    """A slide for each figure of a text."""
    return [f"### {heading}, drawn\n\n![{alt}]({path})\n\n{caption}" for alt, path, caption in FIGURE.findall(text)]


def _sections(text: str, mark: str) -> dict[str, str]:
    """The texts below the headings that begin with `mark`."""
    pieces = re.split(rf"^{mark}(.+)$", text, flags=re.MULTILINE)
    return {name.strip(): body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def _sentences(text: str, count: int) -> str:
    """The first sentences of the first paragraph."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return " ".join(re.split(SENTENCE, paragraph)[:count])


def _last(text: str) -> str:
    """The last sentence of a text: what leads to the equation below it."""
    paragraph = " ".join(text.strip().split("\n\n")[-1].split())
    return re.split(SENTENCE, paragraph)[-1] if not paragraph.startswith("|") else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _notes(text: str) -> str:
    """Speaker's notes: the text, without display equations, tables and figures."""
    text = FIGURE.sub("", EQUATION.sub("(equation)", text))
    words = "\n".join(line for line in text.splitlines() if not line.startswith("|")).strip()
    return f"~~~{{revealjs-notes}}\n{words}\n~~~" if words else ""


def build(root: Path, work: Path, html: Path) -> int:
    """Write every lesson's deck into `work` and make the slides in `html`; returns Sphinx's exit status."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lessons = sorted((root / "lessons").glob("[0-9][0-9]_*.md"))
    for path in lessons:
        text = path.read_text(encoding="utf-8")
        (work / path.name).write_text(deck(text, path.name[:2]), encoding="utf-8")
        for _, figure, _ in FIGURE.findall(text):
            (work / figure).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "lessons" / figure, work / figure)
    names = "\n".join(path.stem for path in lessons)
    index = f"# MiniRL, the slides\n\nThe arrow keys turn pages; S opens the notes.\n\n```{{toctree}}\n{names}\n```\n"
    (work / "index.md").write_text(index, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-b", "revealjs", "-c", str(Path(__file__).parent / "slides")]
    return subprocess.run([*command, "-E", "-W", "--keep-going", "-q", str(work), str(html)]).returncode
