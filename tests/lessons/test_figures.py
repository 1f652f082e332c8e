"""Every lesson has a figure that the repository draws itself, and one can read it."""

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.md"))
FOLDER = ROOT / "lessons" / "figures"
DRAWN = sorted(FOLDER.glob("[0-9][0-9]_*.png"))
# An image with words for those who cannot see it, and in the next paragraph a caption in italics.
EMBEDDED = re.compile(r"^!\[.{20,}\]\(figures/(\d\d_\w+)\.png\)\n\n\*What to see: (?:.+\n)+?.*\*$", re.MULTILINE)

spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
assert spec is not None and spec.loader is not None
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)

each = pytest.mark.parametrize("name", draw.FIGURES)


def words_of(figure: Figure) -> Iterator[Text]:
    """Everything that is written in a figure: titles, labels, legends, the numbers at axes."""
    yield from figure.texts
    for ax in figure.axes:
        yield from (*ax.texts, ax.title)
        if legend := ax.get_legend():
            yield from legend.get_texts()
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            yield axis.label
            yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)


def test_the_script_draws_exactly_what_lies_there():
    assert set(draw.FIGURES) == {path.stem for path in DRAWN}
    assert [path.name for path in DRAWN if path.stat().st_size >= 40_000] == []


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_shows_its_figures_with_captions(lesson):
    shown = EMBEDDED.findall(lesson.read_text(encoding="utf-8"))
    assert len(shown) >= 2
    assert sorted(shown) == [path.stem for path in DRAWN if path.name[:2] == lesson.name[:2]]


@each
def test_a_figure_can_be_read(name):
    figure = draw.FIGURES[name]()
    width, height = figure.get_size_inches()
    with Image.open(FOLDER / f"{name}.png") as image:
        assert image.size == (round(200 * width), round(200 * height))  # or it was not drawn anew
    figure.draw_without_rendering()
    words = [word for word in words_of(figure) if word.get_visible() and word.get_text().strip()]
    assert words
    assert [word.get_text() for word in words if word.get_fontsize() * 7 / width < 9] == []  # 9 pt at 700 pixels
    boxes = [(word.get_text(), word.get_window_extent().padded(-1)) for word in words]
    page = figure.bbox.padded(1)
    assert [text for text, box in boxes if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1))] == []
    assert [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)] == []


def test_an_overlap_and_a_caption_are_really_found():
    figure, ax = draw.diagram(2.0)
    draw.say(ax, 1, 1, "one text")
    draw.say(ax, 1.1, 1, "another")
    one, other = (word.get_window_extent() for word in words_of(figure) if word.get_text())
    assert one.overlaps(other)
    image = "![what the image shows, in words](figures/00_three_policies.png)\n\n"
    assert EMBEDDED.findall(image + "*What to see: this\nand that.*\n") == ["00_three_policies"]
    assert EMBEDDED.findall(image + "No caption.\n") == []
