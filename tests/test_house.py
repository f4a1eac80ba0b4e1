"""The rules of the house, checked on the source itself: who imports whom, that every setting has a reader, how long
things are, and that a stage has one name everywhere."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import polm
from polm import (
    recipe,
    recipe_adapter,
    recipe_data,
    recipe_judge,
    recipe_online,
    recipe_rewards,
    recipe_rl,
    recipe_rounds,
)
from polm.apps.cli import STAGE_HELP
from polm.apps.show import print_plan
from polm.config import Settings, validate
from polm.data.readers import write_jsonl
from polm.demo.corpus import build_demo_dataset
from polm.flywheel.graph import build_graph
from polm.flywheel.kinds import build_any_graph
from polm.flywheel.runner import build_plan
from polm.models.loading import build_model
from polm.recipe_judge import EndpointSettings
from polm.rewards import judge
from polm.stages.table import STAGES

PACKAGE = Path(polm.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600

# Right may import left; rooms in the same braces are siblings and do not import each other.
ORDER: tuple[set[str], ...] = (
    {"tokens", "errors", "cores", "config", "recipe", "recipe_adapter", "recipe_data", "recipe_judge", "recipe_online"}
    | {"recipe_rewards", "recipe_rl", "recipe_rounds", "recipe_types"},
    {"signals", "text", "weights", "demo"},
    {"objectives", "models", "data"},
    {"engine"},
    {"rollout"},
    {"rewards"},
    {"search", "retrieval", "evals"},
    {"stages"},
    {"flywheel"},
    {"report"},
    {"apps"},
    {"__main__"},
)
# "file:function": why it is longer than 60 lines.
LONG_FUNCTIONS: dict[str, str] = {}
# Sections that are handed on whole, field by field as keyword arguments: what takes them.
HANDED_ON = {
    "DemoData": "build_demo_dataset(**model_dump): its parameters carry the same names",
    "ModelShape": "build_model(**model_dump): its parameters carry the same names",
}

# Stages that learn from rollouts, beside grpo, and the classes that their settings share.
RL = ("rloo", "reinforce_pp", "remax", "ppo")
ROLLOUT_SETTINGS = ("Sampling", "Online", "GRPO", "Rollout", "Reinforce", "RLOO", "ReinforcePP", "ReMax", "PPO")
SHORT_PROMPTS = {"pair_prompt": "{question} {answer_a} {answer_b}", "score_prompt": "{question} {answer}"}
TAGS = {"source"}  # by which pydantic picks the class of a union
# Modules that copy or hash settings without acting on them.
RECIPES = (recipe, recipe_adapter, recipe_data, recipe_judge, recipe_online, recipe_rewards, recipe_rl, recipe_rounds)
BOOKKEEPERS = {"config.py", *(f"{module.__name__.rpartition('.')[2]}.py" for module in RECIPES)}
# Read outside of the stages that the test of running stages runs: where.
READ_ELSEWHERE = {
    "WordProblemsData.path": "data stage, with published files",
    "WordProblemsData.seed": "data stage, with published files",
    "WordProblemsData.holdout_share": "data stage, with published files",
    "AnnotateSettings.train_on": "annotate stage, with data: sft",
    "AnnotateSettings.bad_records": "annotate stage, with data: sft or preferences",
    "FilesData.media": "data stage, with records that refer to images",
    "FilesData.bad_records": "data stage, with pairs whose prompts differ: stages/test_bad_records.py",
    "FilesData.seed": "data stage, with a mixture",
    "JudgeStage.bad_records": "judge stage, with pairs as they were given: stages/test_judge.py",
    "FilesData.stop": "data stage, with a mixture",
    **{f"{kind}Settings.epochs": "stages of RL, without updates" for kind in ROLLOUT_SETTINGS},
    **{
        f"{kind}Settings.batch_limit": "rewards, with reward: function"
        for kind in ("Reward", "Answer", "Pairs", "Rejection", *ROLLOUT_SETTINGS)
    },
    "Recipe.workers": "the command line",
    "SelfRewardingRecipe.workers": "the command line",
    "SelfRewardingRecipe.kind": "told before the recipe is read (flywheel/kinds.py)",
    **{f"EndpointSettings.{name}": "a judge on a server" for name in EndpointSettings.model_fields},
    "JudgeSettings.grade_range": "a judge's grade as a reward",
}
# Stages run once more, in the other ways that they have: their knobs are read there only.
SHORT: dict[str, dict[str, Any]] = {
    "rejection": {"max_new_tokens": 24, "temperature": 1.5, "precision": "fp32"},
    "pairs": {"num_prompts": 8, "max_new_tokens": 4, "temperature": 1.5, "precision": "fp32"},
    "online": {"updates": 1, "prompts_per_rollout": 2, "max_new_tokens": 4, "precision": "fp32", "bin_tokens": 192},
}
OTHER_WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rejection", {"keep": "top_share", "share": 1.0}),
    ("pairs", {"choose": "rso", "samples": 8}),
    ("online", {"method": "xpo"}),
    ("online", {"method": "nash_md"}),
)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room_of(module: str) -> str:
    """`polm.data.readers` -> `data`, `polm.tokens` -> `tokens`, `polm` itself -> empty."""
    return [*module.split("."), ""][1]


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(ORDER) if room in rooms)


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules of polm that are imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "polm")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            if node.module == "polm":
                yield from ((f"polm.{alias.name}", node.lineno) for alias in node.names)
            elif node.module and node.module.startswith("polm."):
                yield node.module, node.lineno


def test_imports_go_from_right_to_left() -> None:
    wrong = []
    seen = set()
    for path in FILES:
        own = room_of(".".join(["polm", *path.relative_to(PACKAGE).with_suffix("").parts]))
        if own == "__init__":
            continue
        for module, line in imports_of(parse(path)):
            other = room_of(module)
            if other in (own, "__version__"):
                continue
            seen.add((own, other))
            level, own_level = level_of(other), level_of(own)
            siblings = level == own_level and own_level > 0
            if level > own_level or siblings:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {own} imports {other}")
    assert wrong == []
    assert ("stages", "engine") in seen  # the walk does find imports


def test_every_room_has_its_place() -> None:
    rooms = {p.name if p.is_dir() else p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"}
    rooms -= {"__init__", "__pycache__"}
    assert rooms <= set.union(*ORDER)


def settings_classes() -> dict[str, type[Settings]]:
    return {
        name: value
        for module in RECIPES
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Settings) and value.__module__ == module.__name__
    }


def all_fields() -> set[str]:
    """ "Class.field" of every setting that must be read by attribute."""
    return {
        f"{name}.{field}"
        for name, kind in settings_classes().items()
        if name not in HANDED_ON
        for field in kind.model_fields
        if field not in TAGS
    }


def test_every_setting_has_a_reader() -> None:
    """By attribute: a field that nobody reads is a dead flag. Reads inside recipe.py (its own checks) do not count."""
    read = {
        node.attr
        for path in FILES
        if path.name not in BOOKKEEPERS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    dead = {name for name in all_fields() if name.partition(".")[2] not in read}
    assert dead == set()


def test_every_setting_is_read_when_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Any, step_rows: Any
) -> None:
    """The same, but of the right section: `samples` of pairs is not read by reading `samples` of eval."""
    read: set[str] = set()

    def watch(self: Settings, name: str) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename)
        if name in type(self).model_fields and caller.is_relative_to(PACKAGE) and caller.name not in BOOKKEEPERS:
            read.update(f"{kind.__name__}.{name}" for kind in type(self).__mro__ if issubclass(kind, Settings))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Settings, "__getattribute__", watch)
    workshop = dataclasses.replace(artifact, folder=tmp_path)
    for name in ("eval", "reward_model", "rejection", "online", *RL):
        workshop(name)
    for name in ("remit", "shuffled", "rho1", "distill", "plausible", "microscope"):
        workshop(name)
    for weighting in ("rho1", "plausible"):
        settings = workshop.spec("microscope")[1].model_copy(update={"weighting": weighting})
        workshop.run("microscope", settings, workshop.inputs("microscope"), tmp_path / f"look-{weighting}")
    for stage, changes in OTHER_WAYS:
        settings = validate(type(workshop.spec(stage)[1]), {**SHORT[stage], **changes}, "the test")
        workshop.run(stage, settings, workshop.inputs(stage), tmp_path / "-".join((stage, *map(str, changes.values()))))
    muon = artifact.spec("pretrain")[1].optimizer
    schedule = recipe.ScheduleSettings(kind="wsd", warmup_updates=1, decay_share=0.5)
    more = {"updates": 4, "bin_tokens": 192, "schedule": schedule, "optimizer": muon, "checkpoint_every": 1}
    workshop.run(
        "pretrain",
        recipe.PretrainSettings(**more, model=artifact.spec("pretrain")[1].model),
        workshop.inputs("pretrain"),
        tmp_path / "more",
    )
    for kind in ("ia3", "prefix", "prompt", "lora"):
        tuned = artifact.spec("sft")[1].model_copy(update={"adapter": recipe.AdapterSettings(kind=kind)})
        workshop.run("sft", tuned, workshop.inputs("sft"), tmp_path / kind)
    merge = recipe.MergeAdapterSettings()
    workshop.run("merge_adapter", merge, {"model": str(tmp_path / "lora")}, tmp_path / "merged")
    workshop.run(
        "data",
        recipe_data.DataStage(data=recipe_data.FolderData(source="folder", path=tmp_path / "data")),
        {},
        tmp_path / "folder",
    )
    write_jsonl(tmp_path / "stepwise.jsonl", step_rows)
    steps = recipe.ProcessRewardModelSettings(updates=2, bin_tokens=192, separator=";")
    inputs = {"base": str(workshop("sft")), "data": str(tmp_path / "stepwise.jsonl")}
    workshop.run("process_reward_model", steps, inputs, tmp_path / "prm")
    texts = recipe_data.MixedSource(path=str(tmp_path / "data" / "midtrain.jsonl"))
    files = recipe_data.FilesData(source="files", midtrain=(texts,), benchmarks=tmp_path / "data" / "benchmarks")
    workshop.run("data", recipe_data.DataStage(data=files), {}, tmp_path / "files")
    run_judges(workshop, tmp_path)
    rounds = recipe_rounds.SelfRewardingRecipe(kind="self_rewarding", name="x", base="x", data=recipe_data.DemoData())
    print_plan(Console(quiet=True), build_plan(rounds, build_any_graph(rounds), tmp_path / "rounds"), 1)
    whole = recipe.Recipe(name="x")
    plan = build_plan(whole, build_graph(whole), tmp_path / "run")
    print_plan(Console(quiet=True), plan, 1)
    unread = {name for name in all_fields() if name not in read}
    assert unread == set(READ_ELSEWHERE)


def run_judges(workshop: Any, folder: Path) -> None:
    """A local judge; what the tiny model writes holds no verdict, so a counter stands in for one."""
    models = {"judge": str(folder / "sft"), "base": str(folder / "sft"), "data": str(folder / "data")}
    judging = recipe_judge.JudgeSettings(verdict="text", max_new_tokens=8, **SHORT_PROMPTS)
    more = {"num_prompts": 12, "max_new_tokens": 8, "max_failed": 1, "precision": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        turns = itertools.count()
        patch.setattr(judge, "read_preference", lambda _: float(next(turns) % 2))
        patch.setattr(judge, "read_grade", lambda _, scale: scale[0] + next(turns) % scale[1])
        for by in ("pairs", "scores"):
            settings = recipe_judge.JudgeStage(judging=judging, mode="sample", by=by, **more)
            workshop.run("judge", settings, models, folder / f"judge-{by}")
    revise = recipe_judge.ConstitutionStage(num_prompts=4, max_new_tokens=60, max_critique_tokens=4, precision="fp32")
    models = {role: models[role] for role in ("base", "data")}
    workshop.run("constitution", revise.model_copy(update={"critic_temperature": 1.0}), models, folder / "revised")


def test_sections_that_are_handed_on_whole() -> None:
    """Their fields are exactly the parameters of what takes them, so each has a reader there."""
    takers = {
        "DemoData": (build_demo_dataset, {"out"}, {"source"}),
        "ModelShape": (build_model, {"vocab_size", "seed", "eos_token_id", "pad_token_id"}, set()),
    }
    assert takers.keys() == HANDED_ON.keys()
    for name, (function, more, less) in takers.items():
        fields = set(settings_classes()[name].model_fields) - less
        assert fields == set(inspect.signature(function).parameters) - more, name


def test_functions_and_files_are_short() -> None:
    long = []
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                size = node.end_lineno - node.lineno + 1
                if size > MAX_FUNCTION_LINES and f"{name}:{node.name}" not in LONG_FUNCTIONS:
                    long.append(f"{name}:{node.name} ({size} lines)")
    assert long == []


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_has_one_name(name: str) -> None:
    stage = STAGES[name]
    assert stage.name == name
    assert (PACKAGE / "stages" / f"{name}.py").is_file()
    assert (TESTS / "stages" / f"test_{name}.py").is_file()
    assert STAGE_HELP[name] == stage.summary
    assert stage.run.__module__ == f"polm.stages.{name}"


def test_there_is_no_stage_beside_the_table() -> None:
    files = {p.stem for p in (PACKAGE / "stages").glob("*.py")} - {
        "__init__",
        "answers",
        "common",
        "rollout_source",
        "rollouts",
        "scalar",
        "table",
    }
    assert files == set(STAGES)
    assert set(STAGE_HELP) == set(STAGES)


def test_a_stage_does_not_name_a_setting_as_an_input() -> None:
    """On the command line `role=…` is an input; a setting of the same name must be written `stage.setting=…`."""
    clashes = {
        (name, role)
        for name, stage in STAGES.items()
        for role in (*stage.inputs, *stage.optional_inputs, "out")
        if role in stage.settings.model_fields
    }
    assert clashes == {("midtrain", "base"), ("annotate", "data")}


def calls_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of what is called: `eval`, `torch.load`, `pickle.loads`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_nothing_hostile_can_run() -> None:
    """No eval, exec or pickle, and no loader that unpickles: model weights and model outputs are data."""
    wrong = []
    for path in FILES:
        tree = parse(path)
        place = path.relative_to(PACKAGE)
        for name, line in calls_of(tree):
            last = name.rpartition(".")[2]
            builtin = name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
            if builtin or name.startswith(("pickle.", "marshal.", "shelve.", "os.system")) or name == "torch.load":
                wrong.append(f"{place}:{line}: {name}")
            if last in ("unsafe_load", "full_load") or (name == "yaml.load"):
                wrong.append(f"{place}:{line}: {name}")
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{place}: imports {n}" for n in names if n.split(".")[0] in ("pickle", "marshal", "shelve", "dill")
            ]
            if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code", "allow_pickle"):
                wrong.append(f"{place}:{node.value.lineno}: {node.arg}=")
    assert wrong == []


def test_no_error_is_swallowed() -> None:
    """No bare `except:`, and no handler of everything that does nothing."""
    wrong = []
    for path in FILES:
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in node.body)
            if node.type is None or (everything and silent):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert wrong == []


def test_text_says_nothing_about_where_it_was_written() -> None:
    """No path of somebody's machine in code, recipes or documents."""
    root = PACKAGE.parent
    files = [*FILES, *root.glob("recipes/**/*.yaml"), *root.glob("docs/**/*.md"), *root.glob("*.md")]
    found = [str(p.relative_to(root)) for p in files if "/home/" in p.read_text() or "/Users/" in p.read_text()]
    assert found == []
