"""The kinds of recipes that `polm run` takes: what loads one, and what builds its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polm.config import load_settings, read_yaml
from polm.errors import RecipeError
from polm.flywheel.graph import Graph, build_graph
from polm.flywheel.rounds import build_rounds_graph
from polm.recipe import Recipe
from polm.recipe_rounds import SelfRewardingRecipe

AnyRecipe = Recipe | SelfRewardingRecipe
KINDS: dict[str, type[AnyRecipe]] = {"self_rewarding": SelfRewardingRecipe}


def find_kind(values: Mapping[str, Any], source: str) -> type[AnyRecipe]:
    """The class of a recipe by its `kind`; one that names none is a flywheel."""
    kind = values.get("kind")
    if kind is None:
        return Recipe
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"{source}: kind: found {kind!r}; there is {', '.join(KINDS)}, and without kind a flywheel")
    return KINDS[kind]


def load_recipe(file: Path, overrides: Iterable[str] = ()) -> AnyRecipe:
    """The recipe in a file, of whatever kind."""
    return load_settings(find_kind(read_yaml(file)[0], str(file)), file, overrides)


def build_any_graph(recipe: AnyRecipe) -> Graph:
    """The graph of a recipe of any kind."""
    return build_rounds_graph(recipe) if isinstance(recipe, SelfRewardingRecipe) else build_graph(recipe)
