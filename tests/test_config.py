"""Recipes: every mistake is told with its place, what was found and what is allowed; keys leave cadences out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polm.config import (
    Settings,
    apply_overrides,
    find_recipe,
    list_shipped,
    load_settings,
    read_yaml,
    semantic_values,
    validate,
)
from polm.errors import RecipeError
from polm.flywheel.graph import build_graph
from polm.recipe import EvalSettings, GRPOSettings, MidtrainSettings, ModelShape, PretrainSettings, Recipe, SFTSettings
from polm.recipe_data import DataStage, DemoData, FolderData, WordProblemsData

GOOD = """\
name: small
data: {source: demo, num_sft: 10}
pretrain:
  updates: 3
  model:
    hidden_size: 64
    num_heads: 4
  optimizer: {kind: muon, learning_rate: 1e-2}
sft:
  epochs: 1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_settings(Recipe, write(tmp_path, GOOD))
    assert recipe.name == "small"
    assert isinstance(recipe.data, DemoData)
    assert recipe.data.num_sft == 10
    assert recipe.pretrain.optimizer.learning_rate == 0.01  # 1e-2 is a string to YAML
    assert (recipe.pretrain.updates, recipe.sft.epochs) == (3, 1.0)
    assert (recipe.pretrain.too_long, recipe.sft.too_long) == ("split", "error")


CASES: list[tuple[str, str, str]] = [
    # (what to replace in GOOD, with what, the message)
    (
        "  epochs: 1",
        "  epoch: 1",
        r"recipe.yaml:10: unknown key 'sft.epoch'; did you mean 'epochs'\? \(allowed: .*updates",
    ),
    ("  updates: 3", "  update: 3", r"recipe.yaml:4: unknown key 'pretrain.update'; did you mean 'updates'\?"),
    (
        "    hidden_size",
        "    hiden_size",
        r"recipe.yaml:6: unknown key 'pretrain.model.hiden_size'; did you mean 'hidden_",
    ),
    ("\nsft:", "\nstf:", r"recipe.yaml:9: unknown key 'stf'; did you mean 'sft'\?"),
    ("kind: muon", "kinds: muon", r"recipe.yaml:8: unknown key 'pretrain.optimizer.kinds'; did you mean 'kind'\?"),
    ("num_sft: 10", "num_stf: 10", r"recipe.yaml:2: unknown key 'data.demo.num_stf'; did you mean 'num_sft'\?"),
    ("\nsft:", "\nqqqqqqq:", r"recipe.yaml:9: unknown key 'qqqqqqq' \(allowed: arms, base, cycles"),  # nothing is near
    ("  updates: 3", "  updates: 1.5", r"recipe.yaml:4: pretrain.updates: found 1.5: .*valid integer"),
    ("  updates: 3", "  updates: 0", r"recipe.yaml:4: pretrain.updates: found 0: .*greater than or equal to 1"),
    ("  updates: 3", "  updates: many", r"recipe.yaml:4: pretrain.updates: found 'many': .*valid integer"),
    ("kind: muon", "kind: sgd", r"recipe.yaml:8: pretrain.optimizer.kind: found 'sgd': .*'adamw' or 'muon'"),
    ("1e-2", "-1", r"recipe.yaml:8: pretrain.optimizer.learning_rate: found -1: .*greater than 0"),
    ("1e-2", ".nan", r"recipe.yaml:8: pretrain.optimizer.learning_rate: found nan: .*finite"),
    ("1e-2", "0.1, beta1: 1.0", r"recipe.yaml:8: pretrain.optimizer.beta1: found 1.0: .*less than 1"),
    ("source: demo", "source: internet", r"recipe.yaml:2: data: .*'demo', 'word_problems', 'folder'"),
    ("source: demo, num_sft: 10", "source: folder", r"recipe.yaml:2: data.folder.path is missing and has no default"),
    ("name: small", "seeds: [0]", r"recipe.yaml: name is missing"),
    ("name: small", "name: ../up", r"recipe.yaml:1: name: found '../up': .*pattern"),
    ("name: small", "name: s\nseeds: 3", r"recipe.yaml:2: seeds: found 3: .*tuple"),
    ("name: small", "name: s\nseeds: [0, -1]", r"recipe.yaml:2: seeds.1: found -1: .*greater than or equal to 0"),
    ("name: small", "name: s\nseeds: [99999999999]", r"recipe.yaml:2: seeds.0: found 99999999999: .*less than"),
    ("num_heads: 4", "num_heads: 5", r"recipe.yaml:5: pretrain.model: found a section: hidden_size must be a multiple"),
    ("  epochs: 1", "  epochs: 1\n  updates: 2", r"recipe.yaml:9: sft: .*give updates or epochs, not both"),
    ("sft:\n  epochs: 1", "sft: 3", r"recipe.yaml:9: sft: found 3: .*"),
    ("name: small", "name: s\npairs: null", r"recipe.yaml: the recipe: .*pairs and dpo go together"),
    ("name: small", "name: s\ngrpo: {reward: model}", r"grpo.reward: model needs a reward model, and a flywheel"),
    ("name: small", "name: s\narms: {ntp: {changes: {weighting: ntp}}}", r"the arm ntp is always there"),
    ("name: small", "name: s\narms: {a: {guide: sft}}", r"arms.a.changes names no weighting"),
    ("name: small", "name: s\narms: {'a/b': {changes: {weighting: remit}}}", r"arm name 'a/b': use letters"),
    (
        "name: small",
        "name: s\narms: {a: {changes: {weighting: remit, epz: 1}}}",
        r"arms.a.changes: \['epz'\] may not differ between arms; allowed: alpha, base",
    ),
    (
        "name: small",
        "name: s\narms: {a: {guide: rl, changes: {weighting: remit}}}",
        r"recipe.yaml:2: arms.a.guide: .*'grpo'",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES)
def test_mistakes_in_a_recipe(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(RecipeError, match=message):
        load_settings(Recipe, write(tmp_path, text))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("  epochs: 1", "  epoch: 1").replace("  updates: 3", "  updates: no")
    with pytest.raises(RecipeError) as caught:
        load_settings(Recipe, write(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert ":4:" in lines[0]
    assert ":10:" in lines[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsft: {epochs: 1\npretrain: {}\n", r"recipe.yaml:3: not valid YAML"),
        ("name: 'x\n", r"recipe.yaml:\d: not valid YAML"),
        ("\tname: x\n", r"recipe.yaml:1: not valid YAML"),
        ("- a\n- b\n", r"recipe.yaml: expected a mapping of settings, found list"),
        ("", r"recipe.yaml: expected a mapping of settings, found NoneType"),
        ("!!python/object/apply:os.system [ls]\n", r"recipe.yaml:1: not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_settings(Recipe, write(tmp_path, text))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the last one silently."""
    with pytest.raises(RecipeError, match=r"recipe.yaml:3: 'seeds' is given twice \(first in line 2\)"):
        load_settings(Recipe, write(tmp_path, "name: x\nseeds: [0]\nseeds: [1]\n"))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_settings(Recipe, tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_settings(Recipe, tmp_path)
    with pytest.raises(RecipeError, match=r"no recipe at .*gone.yaml; shipped recipes: .*demo"):
        load_settings(Recipe, tmp_path / "gone.yaml")


def test_recipes_are_found_by_name(tmp_path: Path) -> None:
    assert find_recipe("demo").name == "demo.yaml"
    assert find_recipe(str(write(tmp_path, GOOD))) == tmp_path / "recipe.yaml"
    with pytest.raises(
        RecipeError, match=r"no recipe 'demoo': neither a file nor a shipped recipe; did you mean 'demo'"
    ):
        find_recipe("demoo")


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    words = [
        "seeds=[0, 1]",
        "pretrain.model.hidden_size=128",
        "pretrain.optimizer.learning_rate=3e-4",
        "sft.schedule.kind=cosine",  # a section that the file does not have
        "pairs=null",
        "dpo=",
        "arms={a: {changes: {weighting: rho1, keep: 0.5}}}",
        "name=other",
    ]
    recipe = load_settings(Recipe, write(tmp_path, GOOD), words)
    assert recipe.seeds == (0, 1)
    assert recipe.pretrain.model.hidden_size == 128
    assert recipe.pretrain.model.num_heads == 4  # the rest of the section stays
    assert recipe.pretrain.optimizer.learning_rate == 3e-4
    assert recipe.sft.schedule.kind == "cosine"
    assert (recipe.pairs, recipe.dpo) == (None, None)
    assert recipe.arms["a"].changes == {"weighting": "rho1", "keep": 0.5}
    assert recipe.name == "other"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seeds", r"override 'seeds' is not of the form key=value, for example seed=1"),
        ("=3", r"override '=3' is not of the form key=value"),
        ("sft.epoch=1", r"unknown key 'sft.epoch'; did you mean 'epochs'"),
        ("sft.epochs=x", r"sft.epochs: found 'x': .*number"),
        ("name.x=1", r"override 'name.x=1': name is 'small', not a section with keys of its own"),
        ("seeds=[1", r"override 'seeds=\[1': the value is not valid YAML"),
        ("sft.updates=3", r"give updates or epochs, not both"),
    ],
)
def test_mistakes_in_overrides(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_settings(Recipe, write(tmp_path, GOOD), [word])


def test_a_plain_value_sets_the_path_of_a_section(tmp_path: Path) -> None:
    text = GOOD.replace("{source: demo, num_sft: 10}", "{source: word_problems, path: a, holdout_share: 0.3}")
    recipe = load_settings(Recipe, write(tmp_path, text), ["data=../x"])
    assert recipe.data == WordProblemsData(source="word_problems", path=Path("../x"), holdout_share=0.3)
    with pytest.raises(RecipeError, match=r"unknown key 'data\.demo\.path'"):
        load_settings(Recipe, write(tmp_path, GOOD), ["data=../x"])


def test_overrides_leave_what_they_are_given_alone() -> None:
    values: dict[str, Any] = {"sft": {"epochs": 1, "list": [{"a": 1}]}}
    out = apply_overrides(values, ["sft.epochs=2", "sft.list=[1]"])
    assert values == {"sft": {"epochs": 1, "list": [{"a": 1}]}}
    assert out == {"sft": {"epochs": 2, "list": [1]}}


# ---- sections ------------------------------------------------------------------------------------------------------


def test_a_stage_takes_its_section_or_a_file_of_its_own(tmp_path: Path) -> None:
    whole = load_settings(SFTSettings, write(tmp_path, GOOD), ["bin_tokens=64"], section="sft")
    assert (whole.epochs, whole.bin_tokens) == (1.0, 64)
    own = load_settings(SFTSettings, write(tmp_path, "epochs: 2\n"), section="sft")
    assert own.epochs == 2.0
    with pytest.raises(RecipeError, match=r"recipe.yaml:10: unknown key 'epoch'; did you mean 'epochs'"):
        load_settings(SFTSettings, write(tmp_path, GOOD.replace("epochs", "epoch")), section="sft")
    assert load_settings(SFTSettings, None, ["epochs=3"]).epochs == 3.0
    with pytest.raises(RecipeError, match=r"the command line: unknown key 'epoch'; did you mean 'epochs'"):
        load_settings(SFTSettings, None, ["epoch=3"])


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SFTSettings().epochs = 2.0  # type: ignore[misc]


def test_checks_of_single_sections() -> None:
    with pytest.raises(RecipeError, match=r"pass_k \(8,\) needs at least as many samples, found 4"):
        validate(EvalSettings, {"pass_k": [8]}, "x")
    assert validate(EvalSettings, {"pass_k": [8], "samples": 0}, "x").samples == 0
    with pytest.raises(RecipeError, match="greater than or equal to 2"):
        validate(GRPOSettings, {"samples": 1}, "x")
    with pytest.raises(RecipeError, match="multiple of num_heads"):
        validate(ModelShape, {"num_heads": 4, "num_key_value_heads": 3}, "x")


# ---- what goes into a key ------------------------------------------------------------------------------------------


def test_cadences_are_not_semantic() -> None:
    a = PretrainSettings(updates=5, checkpoint_every=10, log_every=2)
    assert semantic_values(a) == semantic_values(PretrainSettings(updates=5))
    values = semantic_values(a)
    assert "checkpoint_every" not in values
    assert "log_every" not in values
    assert values["updates"] == 5
    assert values["model"]["hidden_size"] == 128
    assert values["optimizer"]["kind"] == "adamw"


@pytest.mark.parametrize("kind", [MidtrainSettings, GRPOSettings, EvalSettings, SFTSettings])
def test_everything_else_is(kind: type[Settings]) -> None:
    """Threads and precision too: the bits depend on them."""
    values = semantic_values(kind())
    assert set(kind.model_fields) - set(values) <= {
        "checkpoint_every",
        "log_every",
        "kl_groups",
        "adapter",
        "bad_records",
        "activation_checkpointing",
    }  # what is logged, not learned, or is at its default; what gives the same bits
    assert {"threads", "precision", "seed"} <= set(values)


def test_an_adapter_is_semantic_once_it_is_given() -> None:
    """Without one the key is what it was before there were adapters."""
    lora, other = (SFTSettings(adapter={"kind": "lora", "rank": rank}) for rank in (2, 3))
    assert semantic_values(lora)["adapter"]["rank"] == 2
    assert semantic_values(lora) != semantic_values(other)
    assert "adapter" not in semantic_values(SFTSettings())


def test_values_are_plain_json() -> None:
    import json

    values = semantic_values(DataStage(data=FolderData(source="folder", path=Path("a/b"))))
    assert values == {"data": {"source": "folder", "path": "a/b"}, "needs": []}
    assert json.loads(json.dumps(semantic_values(Recipe(name="x"))))["name"] == "x"


# ---- shipped recipes -----------------------------------------------------------------------------------------------


ROUNDS = ["self_rewarding"]  # tests/flywheel/test_rounds.py


@pytest.mark.parametrize("name", sorted(set(list_shipped()) - set(ROUNDS)))
def test_shipped_recipes_resolve(name: str) -> None:
    recipe = load_settings(Recipe, find_recipe(name))
    graph = build_graph(recipe)
    # Data, (tokenizer, pretrain,) and for each pass its stages: the control's and each arm's in each cycle.
    roots = 1 if recipe.base is not None else 3
    control = 5 if recipe.dpo is None else 8  # midtrain, sft, grpo and three evaluations; pairs, dpo and a fourth
    control += 1
    arm = control + 2  # and its annotation and its microscope
    assert len(graph) == len(recipe.seeds) * (roots + control + arm * recipe.cycles * len(recipe.arms))
    assert len({node.id for node in graph.values()}) == len(graph)


def test_there_are_shipped_recipes() -> None:
    assert "demo" in list_shipped()
    values, lines = read_yaml(find_recipe("demo"))
    assert lines[("pretrain", "updates")] > lines[("pretrain",)] > lines[("name",)]
    assert values["name"] == "demo"
