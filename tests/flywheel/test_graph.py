"""The graph of a recipe: what stands in it, and who reads whom."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from polm.errors import RecipeError
from polm.flywheel.estimate import count_shape_parameters, estimate_node, estimate_peak
from polm.flywheel.graph import Graph, build_graph
from polm.flywheel.runner import build_plan
from polm.models.loading import build_model, count_parameters
from polm.recipe import (
    Arm,
    DPOSettings,
    GRPOSettings,
    MicroscopeSettings,
    MidtrainSettings,
    ModelShape,
    PretrainSettings,
    Recipe,
    SFTSettings,
    TokenizerSettings,
)

ARMS = {
    "remit": Arm(changes={"weighting": "remit", "eps": 0.8}),
    "by_sft": Arm(guide="sft", changes={"weighting": "remit"}),
    "distill": Arm(changes={"weighting": "distill", "top_k": 8}),
}


def build(**changes: Any) -> tuple[Recipe, Graph]:
    recipe = Recipe(**{"name": "x", "cycles": 2, "arms": ARMS, **changes})
    return recipe, build_graph(recipe)


def test_a_pass_of_the_control() -> None:
    _, graph = build(arms={}, cycles=1)
    assert list(graph) == [
        "s0/data",
        "s0/tokenizer",
        "s0/pretrain",
        *(
            f"s0/c0/ntp/{leaf}"
            for leaf in ("midtrain", "eval_base", "sft", "eval_sft", "pairs", "dpo", "eval_dpo", "grpo", "eval_rl")
        ),
    ]
    inputs = {name: dict(node.inputs) for name, node in graph.items()}
    assert inputs["s0/pretrain"] == {"data": "s0/data", "tokenizer": "s0/tokenizer"}
    assert inputs["s0/c0/ntp/midtrain"] == {"data": "s0/data", "base": "s0/pretrain"}
    assert inputs["s0/c0/ntp/sft"] == {"base": "s0/c0/ntp/midtrain", "data": "s0/data"}
    assert inputs["s0/c0/ntp/pairs"] == {"base": "s0/c0/ntp/sft", "data": "s0/data"}
    assert inputs["s0/c0/ntp/dpo"] == {"base": "s0/c0/ntp/sft", "data": "s0/c0/ntp/pairs"}
    assert inputs["s0/c0/ntp/grpo"] == {"base": "s0/c0/ntp/dpo", "data": "s0/data"}
    assert inputs["s0/c0/ntp/eval_rl"] == {"model": "s0/c0/ntp/grpo", "data": "s0/data"}
    formats = {name[-8:]: node.settings.format for name, node in graph.items() if node.stage == "eval"}  # type: ignore[attr-defined]
    assert formats == {"val_base": "plain", "eval_sft": "chat", "eval_dpo": "chat", "/eval_rl": "chat"}


def test_inputs_stand_before_what_reads_them() -> None:
    _, graph = build(seeds=(0, 3))
    seen: set[str] = set()
    for name, node in graph.items():
        assert seen.issuperset(node.inputs.values())
        assert node.id == name
        seen.add(name)


def test_each_cycle_is_guided_by_the_one_before() -> None:
    _, graph = build()
    guide = lambda cycle, arm: graph[f"s0/c{cycle}/{arm}/annotate"].inputs["model"]  # noqa: E731
    assert guide(1, "remit") == "s0/c0/ntp/grpo"
    assert guide(2, "remit") == "s0/c1/remit/grpo"
    assert guide(1, "by_sft") == "s0/c0/ntp/sft"
    assert guide(2, "by_sft") == "s0/c1/by_sft/sft"
    for cycle in (1, 2):
        for arm in ARMS:
            inputs = graph[f"s0/c{cycle}/{arm}/midtrain"].inputs
            assert inputs["base"] == "s0/pretrain"  # every mid-training starts from before annealing
            assert inputs["reference"] == f"s0/c{cycle}/{arm}/annotate"
    assert Counter(node.arm for node in graph.values()) == {None: 3, "ntp": 9, "remit": 22, "by_sft": 22, "distill": 22}


def test_each_arm_has_a_microscope() -> None:
    recipe, graph = build(midtrain=MidtrainSettings(bin_tokens=300, too_long="truncate"))
    node = graph["s0/c2/by_sft/microscope"]
    assert node.inputs == {"base": "s0/pretrain", "reference": "s0/c1/by_sft/sft", "data": "s0/data"}
    settings = graph["s0/c1/remit/microscope"].settings
    assert isinstance(settings, MicroscopeSettings)
    assert (settings.weighting, settings.eps, settings.bin_tokens, settings.too_long) == ("remit", 0.8, 300, "truncate")
    assert "s0/c0/ntp/microscope" not in graph  # plain next-token prediction has no weights
    assert estimate_node(node, recipe).memory_bytes is not None
    _, outside = build(base="somebody/model", cycles=1)
    assert outside["s0/c1/remit/microscope"].external == {"base": "somebody/model"}
    _, without = build(microscope=None)
    assert set(graph) - set(without) == {f"s0/c{c}/{arm}/microscope" for c in (1, 2) for arm in ARMS}
    with pytest.raises(ValueError, match=r"microscope\.eps is set by the flywheel from each arm; leave it out"):
        build(microscope=MicroscopeSettings(eps=0.5))


def test_settings_of_an_arm() -> None:
    recipe, graph = build(midtrain=MidtrainSettings(updates=7, bin_tokens=300))
    remit = graph["s0/c1/remit/midtrain"].settings
    assert isinstance(remit, MidtrainSettings)
    assert (remit.weighting, remit.eps, remit.updates) == ("remit", 0.8, 7)
    assert graph["s0/c0/ntp/midtrain"].settings == recipe.midtrain
    annotate = graph["s0/c1/distill/annotate"].settings
    assert (annotate.top_k, annotate.max_tokens) == (8, 300)  # type: ignore[attr-defined]
    assert graph["s0/c1/remit/annotate"].settings.top_k == 0  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"the recipe x, arms.bad: eps: found 3: .*less than or equal to 1"):
        build(arms={"bad": Arm(changes={"weighting": "remit", "eps": 3})})


def test_without_preferences() -> None:
    _, graph = build(arms={}, pairs=None, dpo=None)
    assert not any(node.stage in ("pairs", "dpo") for node in graph.values())
    assert graph["s0/c0/ntp/grpo"].inputs["base"] == "s0/c0/ntp/sft"


def test_a_base_from_outside() -> None:
    _, graph = build(base="somebody/model", cycles=1)
    assert not any(node.stage in ("tokenizer", "pretrain") for node in graph.values())
    for name in ("s0/c0/ntp/midtrain", "s0/c1/remit/midtrain"):
        assert graph[name].external == {"base": "somebody/model"}
        assert "base" not in graph[name].inputs


def test_seeds_are_offsets_and_reach_everything() -> None:
    _, graph = build(seeds=(0, 5), sft=SFTSettings(seed=100))
    assert graph["s5/c0/ntp/sft"].settings.seed == 105  # type: ignore[attr-defined]
    assert graph["s0/c0/ntp/sft"].settings.seed == 100  # type: ignore[attr-defined]
    assert graph["s5/data"].settings.data.seed == 5  # type: ignore[attr-defined]
    for leaf in ("pretrain", "c0/ntp/midtrain", "c1/remit/midtrain", "c0/ntp/pairs", "c0/ntp/dpo", "c0/ntp/grpo"):
        assert graph[f"s5/{leaf}"].settings.seed == 5  # type: ignore[attr-defined]
    # Seeds draw their samples independently; within a seed the arms share the draw.
    assert graph["s5/c0/ntp/eval_rl"].settings.seed == 5  # type: ignore[attr-defined]
    assert graph["s5/c0/ntp/eval_rl"].settings == graph["s5/c1/remit/eval_rl"].settings


def keys_of(tmp_path: Path, **changes: Any) -> dict[str, str]:
    recipe, graph = build(**changes)
    return dict(build_plan(recipe, graph, tmp_path).keys)


def test_a_change_reaches_what_stands_behind_it_and_nothing_else(tmp_path: Path) -> None:
    before = keys_of(tmp_path)

    def changed(**changes: Any) -> set[str]:
        after = keys_of(tmp_path, **changes)
        return {name for name in before if before[name] != after[name]}

    assert changed(name="y") == set()
    assert changed(workers=3) == set()
    assert changed(pretrain=PretrainSettings(checkpoint_every=7, log_every=3)) == set()
    behind = {name for name in before if name.endswith(("/dpo", "/grpo", "/eval_dpo", "/eval_rl"))}
    later = {n for n in before if "/c2/remit" in n or "/c2/distill" in n or "/c1/remit" in n or "/c1/distill" in n}
    assert changed(dpo=DPOSettings(beta=0.2)) == behind | later
    # The arm by_sft never reads an RL model: only its own RL models and their evaluations change.
    rl = {name for name in before if name.endswith(("/grpo", "/eval_rl"))}
    assert changed(grpo=GRPOSettings(samples=4)) == rl | later
    arm = {name for name in before if "/remit/" in name} - {"s0/c1/remit/annotate"}
    assert changed(arms={**ARMS, "remit": Arm(changes={"weighting": "remit", "eps": 0.7})}) == arm
    assert changed(tokenizer=TokenizerSettings(vocab_size=300)) == set(before) - {"s0/data"}


def test_arms_that_agree_are_one_artifact(tmp_path: Path) -> None:
    twins = {"one": Arm(changes={"weighting": "remit"}), "two": Arm(changes={"weighting": "remit"})}
    keys = keys_of(tmp_path, arms=twins)
    for cycle in (1, 2):
        for leaf in ("annotate", "midtrain", "sft", "grpo", "eval_rl"):
            assert keys[f"s0/c{cycle}/one/{leaf}"] == keys[f"s0/c{cycle}/two/{leaf}"]
    assert keys["s0/c1/one/midtrain"] != keys["s0/c2/one/midtrain"]
    # Arms with the same guide share its scores even where they use them differently.
    keys = keys_of(tmp_path, arms={**twins, "three": Arm(changes={"weighting": "rho1"})})
    assert keys["s0/c1/one/annotate"] == keys["s0/c1/three/annotate"]


# ---- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_parameters_of_a_shape(tie: bool) -> None:
    shape = ModelShape(hidden_size=32, num_layers=3, num_heads=4, num_key_value_heads=2, tie_embeddings=tie)
    model = build_model(**shape.model_dump(), vocab_size=200, seed=0, eos_token_id=1, pad_token_id=0)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert count_shape_parameters(shape, 200) == count_parameters(model) - norms


def test_estimates_of_nodes() -> None:
    recipe, graph = build(
        pretrain=PretrainSettings(updates=10, bin_tokens=100, bins_per_update=4, micro_bins=1),
        sft=SFTSettings(epochs=1),
        grpo=GRPOSettings(updates=6, updates_per_rollout=2, prompts_per_rollout=8, samples=4),
    )
    pretrain = estimate_node(graph["s0/pretrain"], recipe)
    assert (pretrain.updates, pretrain.tokens) == (10, 4000)
    sft = estimate_node(graph["s0/c0/ntp/sft"], recipe)
    assert (sft.updates, sft.tokens) == (None, None)  # it depends on the data
    grpo = estimate_node(graph["s0/c0/ntp/grpo"], recipe)
    assert (grpo.updates, grpo.samples) == (6, 3 * 8 * 4)
    assert estimate_node(graph["s0/c0/ntp/pairs"], recipe).samples == 500 * 4
    whole = [estimate_node(node, recipe).memory_bytes or 0.0 for node in graph.values()]
    two, four = (estimate_peak(graph, recipe, workers) for workers in (2, 4))
    assert two is not None
    assert four is not None
    assert sum(sorted(whole)[-2:]) < two < four
    outside, outside_graph = build(base="a/b")
    assert estimate_peak(outside_graph, outside, 2) is None
