"""The flywheel as an unrolled graph of stages: the whole pipeline on one page.

For each seed:

    data ─► tokenizer ─► pretrain ──┬─► cycle 0, arm ntp:   midtrain ─► sft ─► pairs ─► dpo ─► grpo
                                    │                                                        │
                                    ├─► cycle 1, each arm:  annotate(guide) ─► midtrain ─► … grpo   (and a microscope)
                                    │                                                        │
                                    └─► cycle 2, each arm:  annotate(its own guide) ─► …

Every mid-training starts from the same checkpoint before annealing and reads the same data in the same order; only
the weights of the tokens differ. Plain next-token prediction does not depend on a reference, so cycle 0 is the
control of every cycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polm.config import Settings, validate
from polm.recipe import (
    MICROSCOPE_FIELDS,
    AnnotateSettings,
    Arm,
    EvalSettings,
    MicroscopeSettings,
    MidtrainSettings,
    Recipe,
)
from polm.recipe_data import DataStage
from polm.stages.common import Stage
from polm.stages.table import STAGES


@dataclass(frozen=True)
class Node:
    """One stage of one seed, cycle and arm. `inputs` maps roles to node ids, `external` to paths or hub ids."""

    id: str
    stage: str
    settings: Settings
    inputs: Mapping[str, str] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    cycle: int | None = None
    arm: str | None = None

    @property
    def spec(self) -> Stage:
        return STAGES[self.stage]


Graph = dict[str, Node]


def build_graph(recipe: Recipe) -> Graph:
    """All nodes of a recipe, in an order in which each stands after its inputs."""
    graph: Graph = {}
    for seed in recipe.seeds:
        root = _add_roots(graph, recipe, seed)
        _add_pass(graph, recipe, seed, root, cycle=0, arm="ntp", midtrain=recipe.midtrain, guide=None)
        for name, arm in recipe.arms.items():
            before = "ntp"
            for cycle in range(1, (arm.cycles or recipe.cycles) + 1):
                guide = f"s{seed}/c{cycle - 1}/{before}/{arm.guide}"
                _add_pass(graph, recipe, seed, root, cycle, name, arm_settings(recipe, name, arm), guide)
                before = name
    return graph


def arm_settings(recipe: Recipe, name: str, arm: Arm) -> MidtrainSettings:
    """The recipe's midtrain section with an arm's changes over it."""
    values = {**recipe.midtrain.model_dump(), **arm.changes}
    return validate(MidtrainSettings, values, f"the recipe {recipe.name}, arms.{name}")


def _add_roots(graph: Graph, recipe: Recipe, seed: int) -> str:
    """Data, tokenizer and the checkpoint before annealing; returns the id of the checkpoint's node or its path."""
    data = recipe.data
    if hasattr(data, "seed"):
        data = data.model_copy(update={"seed": data.seed + seed})
    needs: tuple[str, ...] = ("midtrain.jsonl", "sft.jsonl", "prompts.jsonl", "benchmarks")
    needs = needs if recipe.base is not None else ("pretrain.jsonl", *needs)
    _add(graph, Node(f"s{seed}/data", "data", DataStage(data=data, needs=needs), seed=seed))
    if recipe.base is not None:
        return recipe.base
    _add(graph, Node(f"s{seed}/tokenizer", "tokenizer", recipe.tokenizer, {"data": f"s{seed}/data"}, seed=seed))
    inputs = {"data": f"s{seed}/data", "tokenizer": f"s{seed}/tokenizer"}
    _add(graph, Node(f"s{seed}/pretrain", "pretrain", seeded(recipe.pretrain, seed), inputs, seed=seed))
    return f"s{seed}/pretrain"


def _add_pass(
    graph: Graph,
    recipe: Recipe,
    seed: int,
    root: str,
    cycle: int,
    arm: str,
    midtrain: MidtrainSettings,
    guide: str | None,
) -> None:
    """Once round: midtrain, sft, pairs, dpo, grpo, with an evaluation after each training stage."""
    here = f"s{seed}/c{cycle}/{arm}"
    data = f"s{seed}/data"

    def add(leaf: str, stage: str, settings: Settings, inputs: dict[str, str], **external: str) -> str:
        node = Node(f"{here}/{leaf}", stage, settings, inputs, external, seed, cycle, arm)
        return _add(graph, node)

    inputs = {"data": data}
    if guide is not None:
        inputs["reference"] = add("annotate", "annotate", annotate_settings(midtrain), {"model": guide, "data": data})
    start = {"base": root} if recipe.base is not None else {}
    if not start:
        inputs["base"] = root
    if guide is not None and recipe.microscope is not None:
        roles = {**inputs, "reference": guide}  # the guide itself: benchmark solutions are in no annotation
        add("microscope", "microscope", microscope_settings(recipe.microscope, midtrain, seed), roles, **start)
    model = add("midtrain", "midtrain", seeded(midtrain, seed), inputs, **start)
    add("eval_base", "eval", _eval(recipe, "plain", seed), {"model": model, "data": data})
    model = add("sft", "sft", seeded(recipe.sft, seed), {"base": model, "data": data})
    add("eval_sft", "eval", _eval(recipe, "chat", seed), {"model": model, "data": data})
    if recipe.dpo is not None and recipe.pairs is not None:
        pairs = add("pairs", "pairs", seeded(recipe.pairs, seed), {"base": model, "data": data})
        model = add("dpo", "dpo", seeded(recipe.dpo, seed), {"base": model, "data": pairs})
        add("eval_dpo", "eval", _eval(recipe, "chat", seed), {"model": model, "data": data})
    model = add("grpo", "grpo", seeded(recipe.grpo, seed), {"base": model, "data": data})
    add("eval_rl", "eval", _eval(recipe, "chat", seed), {"model": model, "data": data})


def annotate_settings(midtrain: MidtrainSettings) -> AnnotateSettings:
    """Annotate exactly the documents, cut in the same way, that mid-training will read."""
    return AnnotateSettings(
        data="midtrain",
        top_k=midtrain.reference_top_k,
        bin_tokens=midtrain.bin_tokens,
        max_tokens=midtrain.bin_tokens,
        too_long=midtrain.too_long,
        precision=midtrain.precision,
        threads=midtrain.threads,
    )


def microscope_settings(section: MicroscopeSettings, midtrain: MidtrainSettings, seed: int) -> MicroscopeSettings:
    """The recipe's section with the weighting of an arm: the same cuts, the same weights."""
    values = {**seeded(section, seed).model_dump(), **midtrain.model_dump(include=set(MICROSCOPE_FIELDS))}
    return validate(MicroscopeSettings, values, "the microscope of an arm")


def _eval(recipe: Recipe, form: str, seed: int) -> EvalSettings:
    """The arms of a seed share their sampling noise, seeds do not. After SFT the form of an answer is settled."""
    not_first = recipe.eval.not_first if form == "plain" else ()
    changes = {"format": form, "seed": recipe.eval.seed + seed, "not_first": not_first}
    return recipe.eval.model_copy(update=changes)


def seeded(settings: Any, seed: int) -> Any:
    """A stage's settings for one seed of the recipe: its own seed is an offset."""
    return settings.model_copy(update={"seed": settings.seed + seed})


def _add(graph: Graph, node: Node) -> str:
    assert node.id not in graph, node.id
    assert all(source in graph for source in node.inputs.values()), node
    graph[node.id] = node
    return node.id
