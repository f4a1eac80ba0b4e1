"""Self-rewarding iterations as a graph (Yuan et al. 2024, arXiv 2401.10020).

For each seed:

    data ─► (sft) ─► iteration 1: judge (answers, grades of its own) ─► dpo ─► iteration 2: judge ─► dpo ─► …

An evaluation stands after the start and after each iteration, where the recipe has one. Cycle m is iteration m.
"""

from __future__ import annotations

from polm.config import Settings
from polm.data.packing import mix_seed
from polm.flywheel.graph import Graph, Node, seeded
from polm.recipe_data import DataStage
from polm.recipe_rounds import SelfRewardingRecipe

ARM = "self"


def build_rounds_graph(recipe: SelfRewardingRecipe) -> Graph:
    """All nodes of a recipe, in an order in which each stands after its inputs."""
    graph: Graph = {}
    for seed in recipe.seeds:
        _add_seed(graph, recipe, seed)
    return graph


def _add_seed(graph: Graph, recipe: SelfRewardingRecipe, seed: int) -> None:
    data = f"s{seed}/data"
    settings = (
        recipe.data.model_copy(update={"seed": recipe.data.seed + seed}) if hasattr(recipe.data, "seed") else None
    )
    needs = ("prompts.jsonl", *(("sft.jsonl",) if recipe.sft else ()), *(("benchmarks",) if recipe.eval else ()))
    graph[data] = Node(data, "data", DataStage(data=settings or recipe.data, needs=needs), seed=seed)

    def add(cycle: int, leaf: str, stage: str, settings: Settings, models: dict[str, str], read: str = data) -> str:
        """A node that reads models (ids of nodes, or the base from outside) and a folder of data."""
        inside = {role: source for role, source in models.items() if source in graph}
        outside = {role: source for role, source in models.items() if source not in graph}
        node = Node(
            f"s{seed}/c{cycle}/{ARM}/{leaf}", stage, settings, {"data": read, **inside}, outside, seed, cycle, ARM
        )
        graph[node.id] = node
        return node.id

    def evaluate(cycle: int, point: str, model: str) -> None:
        if recipe.eval is not None:
            add(cycle, f"eval_{point}", "eval", seeded(recipe.eval, seed), {"model": model})

    model = recipe.base
    if recipe.sft is not None:
        model = add(0, "sft", "sft", seeded(recipe.sft, seed), {"base": model})
    evaluate(0, "sft" if recipe.sft is not None else "start", model)
    for iteration in range(1, recipe.iterations + 1):
        # Other prompts and other draws each time, and none that another seed of the recipe has.
        judge = recipe.judge.model_copy(update={"seed": mix_seed(recipe.judge.seed, seed, iteration) % 2**32})
        pairs = add(iteration, "judge", "judge", judge, {"base": model, "judge": model})
        model = add(iteration, "dpo", "dpo", seeded(recipe.dpo, seed), {"base": model}, pairs)
        evaluate(iteration, "dpo", model)
