"""The recipes: configs to train with by name, as `minirl train --config demo`."""

from pathlib import Path

RECIPES = Path(__file__).parent
"""The folder of the recipes that ship with the package."""
_SCALE_RECIPES = Path(__file__).parents[2] / "scale" / "recipes"  # in a checkout


def recipes() -> dict[str, Path]:
    """The files of the recipes by name: of those that ship, and in a checkout of scale/recipes too."""
    return {path.stem: path for folder in (RECIPES, _SCALE_RECIPES) for path in sorted(folder.glob("*.yaml"))}
