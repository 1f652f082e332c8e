"""What labs put on the page: tables, charts and sliders."""

from collections.abc import Callable, Sequence
from typing import Any

from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minirl_edu.plots import to_png

BLUE, ORANGE, GREEN, YELLOW, PINK, GREY, BLACK = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#767676", "#000000"),
)


def show_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Display a table: its header, and the cells of each row."""
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def charts(columns: int, height: float = 3.6, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with rows × columns charts, row by row."""
    figure = Figure(figsize=(9.5, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs).ravel().tolist()


def tidy(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Write the title and the labels of a chart, and take its upper and right borders away."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)


def image(figure: Figure, width: int = 850) -> Image:
    """The figure as a PNG, `width` pixels wide on the page."""
    return Image(to_png(figure), width=width)


def sliders(picture: Callable[..., Image], **choices: tuple[Sequence[Any], Any]) -> None:
    """The picture with a slider for each argument: the values it runs over, and the one at which it starts."""
    try:
        from ipywidgets import SelectionSlider, interact
    except ImportError:
        print(f"no ipywidgets here: call {picture.__name__}({', '.join(choices)}) yourself")
        return

    def turn(**chosen: Any) -> None:
        display(picture(**chosen))

    interact(
        turn,
        **{
            name: SelectionSlider(options=values, value=start, description=name, continuous_update=False)
            for name, (values, start) in choices.items()
        },
    )
