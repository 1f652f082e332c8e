"""What labs show things with: tables, figures as pictures of a page's width, and controls where a kernel runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers.utils import logging

from minirl_edu.plots import to_png

WIDTH = 850
"""Pixels of a page."""


def set_up() -> None:
    """One thread, which small models are fastest with, and no progress bars."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def show_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Display a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def picture(figure: Figure, width: int = WIDTH) -> Image:
    """The figure as a PNG, `width` pixels wide on the page."""
    return Image(to_png(figure), width=width)


def turn(draw: Callable[..., Figure], otherwise: str, **controls: Any) -> None:
    """Controls that redraw a figure when they are released; `controls` as in ipywidgets' `interact`.

    Without ipywidgets a sentence says to call `otherwise` instead.
    """
    try:
        from ipywidgets import interactive
    except ImportError:
        print(f"no ipywidgets here; try {otherwise}")
        return
    panel = interactive(lambda **chosen: display(picture(draw(**chosen))), **controls)
    for control in panel.children:
        if control.has_trait("continuous_update"):
            control.set_trait("continuous_update", False)
    display(panel)


def axes_of(figure: Figure, columns: int, rows: int = 1, **options: Any) -> list[Axes]:
    """Plain axes, row by row, without upper and right borders."""
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    return axes


def titled(ax: Axes, title: str) -> None:
    """A title above the left corner."""
    ax.set_title(title, loc="left", fontsize=11)
