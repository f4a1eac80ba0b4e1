"""The command line, in this process: what it prints, what it writes, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from polm import __version__
from polm.apps import cli
from polm.config import validate
from polm.errors import StoreError
from polm.evals.claims import build_claim, write_claims
from polm.flywheel import runner
from polm.flywheel.graph import build_graph
from polm.flywheel.store import lock, read_manifest
from polm.models.loading import save_model
from polm.recipe import Recipe
from polm.stages.table import STAGES


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def polm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """polm("sft", "base=…") in an empty folder, with the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 200)

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["polm", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), printed.out, printed.err)

    return run


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


CHAT = {"messages": [{"role": "user", "content": "add 1 and 2 ."}, {"role": "assistant", "content": "#### 3"}]}
SHORT = ("updates=1", "bin_tokens=64")


# ---- single stages -------------------------------------------------------------------------------------------------


def test_a_stage_from_a_recipe(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", CHAT, CHAT)
    done = polm("sft", "--recipe", "demo", f"base={artifact('midtrain')}", f"data={data}", "out=tuned", "epochs=2")
    assert (done.code, done.err) == (0, "")
    manifest = read_manifest(tmp_path / "tuned")
    demo = yaml.safe_load((cli.find_recipe("demo")).read_text())["sft"]
    assert manifest["config"]["bin_tokens"] == demo["bin_tokens"]  # from the recipe
    assert manifest["config"]["epochs"] == 2  # from the words
    assert manifest["inputs"].keys() == {"base", "data"}
    assert "one example, supervised tokens in ⟦ ⟧:" in done.out
    assert "⟦#### 3 <|eos|>⟧" in done.out
    assert f"ledger: read {2:,}, tokens_read" in done.out
    assert "tok/s" in done.out  # a progress line with its rate
    assert " s left" in done.out
    assert "-> tuned" in done.out

    again = polm("sft", "--recipe", "demo", f"base={artifact('midtrain')}", f"data={data}", "out=tuned", "epochs=2")
    assert again.code == 0
    assert read_manifest(tmp_path / "tuned") == manifest
    other = polm("sft", "--recipe", "demo", f"base={artifact('midtrain')}", f"data={data}", "out=tuned", "seed=3")
    assert other.code == 2
    assert "tuned holds another artifact" in other.err


def test_a_stage_with_settings_of_its_own(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("updates: 1\nbin_tokens: 64\noptimizer: {kind: muon}\n")
    data = write(tmp_path / "mine.jsonl", CHAT)
    done = polm("sft", "--recipe", "mine.yaml", f"base={artifact('midtrain')}", f"data={data}", "out=o", "threads=1")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "o")["config"]["optimizer"]["kind"] == "muon"


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_without_inputs_says_what_it_needs(polm: Cli, name: str, tmp_path: Path) -> None:
    done = polm(name)
    needed = [*STAGES[name].inputs, "out"]
    assert done.code == 2
    assert f"polm {name} needs {', '.join(needed)}: polm {name} {' '.join(f'{r}=…' for r in needed)}" in done.err
    assert list(tmp_path.iterdir()) == []
    if len(needed) > 1:
        assert f"polm {name} needs {', '.join(needed[:-1])}:" in polm(name, "out=x").err


def test_an_input_given_twice_is_refused(polm: Cli) -> None:
    done = polm("sft", "base=a", "data=d", "base=b", "out=o")
    assert done.code == 2
    assert "base=… is given more than once" in done.err


def test_a_setting_that_has_the_name_of_an_input(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    """`base` is midtrain's model; the setting `base` is written midtrain.base."""
    words = (f"base={artifact('pretrain')}", f"data={artifact('data')}", f"reference={artifact('annotate')}")
    settings = ("weighting=remit", "midtrain.base=frozen", "updates=1", "bin_tokens=192", "precision=fp32")
    done = polm("midtrain", *words, *settings, "out=o")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "o")["config"]["base"] == "frozen"
    done = polm("annotate", f"model={artifact('sft')}", f"data={artifact('data')}", "annotate.data=sft", "out=scores")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "scores")["config"]["data"] == "sft"


def test_data_and_annotate_from_a_recipe(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    recipe = {
        "name": "x",
        "data": {"source": "folder", "path": str(artifact("data"))},
        "midtrain": {"bin_tokens": 192, "too_long": "drop", "precision": "fp32"},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert polm("data", "--recipe", "r.yaml", "out=d").code == 0
    assert (tmp_path / "d" / "sft.jsonl").read_bytes() == (artifact("data") / "sft.jsonl").read_bytes()
    done = polm("annotate", "--recipe", "r.yaml", f"model={artifact('grpo')}", "data=d", "out=scores", "top_k=2")
    assert done.code == 0, done.err
    config = read_manifest(tmp_path / "scores")["config"]
    assert (config["max_tokens"], config["too_long"], config["top_k"], config["data"]) == (192, "drop", 2, "midtrain")
    words = (f"base={artifact('pretrain')}", f"reference={artifact('grpo')}", "data=d", "eps=0.5", "out=scope")
    done = polm("microscope", "--recipe", "r.yaml", *words)
    assert done.code == 0, done.err
    config = read_manifest(tmp_path / "scope")["config"]
    assert (config["bin_tokens"], config["too_long"], config["weighting"], config["eps"]) == (192, "drop", "remit", 0.5)
    # A recipe that leaves a stage out gives its defaults.
    done = polm("pairs", "--recipe", "r.yaml", "out=p")
    assert "polm pairs needs base, data" in done.err


def test_the_demo_data_by_words(polm: Cli, tmp_path: Path) -> None:
    words = ["data.num_pretrain_docs=20", "data.num_midtrain_docs=5", "data.num_sft=5", "data.num_prompts=5"]
    done = polm("data", "out=d", "data.source=demo", *words, "data.num_items=1")
    assert done.code == 0, done.err
    assert len((tmp_path / "d" / "pretrain.jsonl").read_text().splitlines()) == 20


# ---- mistakes ------------------------------------------------------------------------------------------------------

LONG = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "1 " * 99}]}
MISTAKES: dict[str, tuple[tuple[Any, ...], tuple[str, ...], str]] = {
    # name: (rows of mine.jsonl, words, what the error says)
    "broken line": ((CHAT, '{"messages": [', CHAT), SHORT, "mine.jsonl:2: not valid JSON: "),
    "no object": ((CHAT, "3"), SHORT, "mine.jsonl:2: expected a JSON object {...}, found"),
    "wrong columns": ((CHAT, {"question": "x", "reply": "y"}), SHORT, "mine.jsonl:2: "),
    "unknown role": (({"messages": [{"role": "robot", "content": "x"}]},), SHORT, "mine.jsonl:1: "),
    "silent assistant": (({"messages": [{"role": "user", "content": "x"}]},), SHORT, "mine.jsonl:1: "),
    "empty file": ((), SHORT, "mine.jsonl holds no rows; expected one JSON object a line"),
    "too long": ((CHAT, LONG), SHORT, "conversation 1 has 1"),
    "unknown key": ((CHAT,), (*SHORT, "epoch=3"), "the command line: unknown key 'epoch'; did you mean 'epochs'?"),
    "wrong value": ((CHAT,), ("updates=many",), "the command line: updates: found 'many': "),
    "both lengths": ((CHAT,), ("updates=1", "epochs=1"), "give updates or epochs, not both"),
    "no such recipe": ((CHAT,), ("--recipe", "gone.yaml"), "no recipe at gone.yaml; shipped recipes: "),
    "not an override": ((CHAT,), ("seed",), "override 'seed' is not of the form key=value"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line_each(polm: Cli, artifact: Any, tmp_path: Path, mistake: str) -> None:
    rows, words, message = MISTAKES[mistake]
    data = write(tmp_path / "mine.jsonl", *rows)
    done = polm("sft", f"base={artifact('midtrain')}", f"data={data}", "out=o", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err + done.out
    # Nothing stands in the way of the cure.
    assert not (tmp_path / "o").exists()
    data = write(tmp_path / "mine.jsonl", CHAT)
    assert polm("sft", f"base={artifact('midtrain')}", f"data={data}", "out=o", *SHORT).code == 0


def test_missing_inputs(polm: Cli, artifact: Any, other_model: Path, tmp_path: Path) -> None:
    base, data = artifact("midtrain"), artifact("data")
    done = polm("sft", f"base={base}", "data=nowhere", "out=o")
    assert done.code == 2
    assert "data: expected the file sft.jsonl in nowhere, or a path to such a file (found: no such folder)" in done.err
    done = polm("sft", "base=./nowhere", f"data={data}", "out=o")
    assert done.code == 2
    assert "no model folder at ./nowhere; give a folder with a Hugging Face checkpoint, or a hub id" in done.err
    done = polm("sft", "base=some/model", f"data={data}", "out=o")
    assert done.code == 2
    assert "the model some/model could not be loaded" in done.err
    words = (f"base={artifact('pretrain')}", f"data={data}", "weighting=remit", "out=o")
    done = polm("midtrain", *words)
    assert done.code == 2
    assert "weighting remit compares with a reference model: give reference=MODEL" in done.err
    done = polm("midtrain", *words, f"reference={other_model}")
    assert done.code == 2
    assert "do not have the same tokenizer" in done.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("x")
    done = polm("sft", f"base={base}", f"data={data}", "out=mine")
    assert done.code == 2
    assert "mine is not empty and holds no artifact of ours" in done.err


def test_what_happens_to_defects(polm: Cli, artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours keeps its traceback: only users' mistakes are told without one."""

    def fail(*_: Any) -> None:
        raise KeyError("defect")

    monkeypatch.setattr("polm.flywheel.store.compute_key", fail)
    with pytest.raises(KeyError, match="defect"):
        polm("sft", f"base={artifact('midtrain')}", f"data={artifact('data')}", "out=o")


# ---- runs ----------------------------------------------------------------------------------------------------------


class InlinePool:
    """Stands in for the pool of processes (which tests/flywheel covers): the work is done when it is submitted."""

    def __init__(self, *_: Any, **__: Any):
        self._processes: dict[int, Any] = {}

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., None], *args: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - a future holds whatever was raised
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def recipe_of(artifact: Any, **changes: Any) -> dict[str, Any]:
    length = {"bin_tokens": 192, "precision": "fp32"}
    shape = artifact.spec("pretrain")[1].model.model_dump()
    return {
        "name": "tiny",
        "cycles": 1,
        "arms": {"remit": {"changes": {"weighting": "remit"}}},
        "data": {"source": "folder", "path": str(artifact("data"))},
        "tokenizer": {"kind": "word", "vocab_size": 200},
        "pretrain": {**length, "updates": 2, "model": shape},
        "midtrain": {**length, "updates": 2},
        "sft": {**length, "updates": 1},
        "pairs": None,
        "dpo": None,
        "grpo": {**length, "updates": 1, "prompts_per_rollout": 2, "samples": 2, "max_new_tokens": 2},
        "eval": {"samples": 1, "pass_k": [1], "max_new_tokens": 2, "precision": "fp32"},
        "workers": 1,
        **changes,
    }


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InlinePool)


def test_a_dry_run_writes_nothing(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact)))
    done = polm("run", "tiny.yaml", "--dry-run", "grpo.updates=6")
    assert (done.code, done.err) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]
    assert "hidden_size: 32" in done.out  # the resolved recipe, with defaults
    assert "temperature: 1.0" in done.out
    for node in ("s0/pretrain", "s0/c0/ntp/grpo", "s0/c1/remit/annotate", "s0/c1/remit/eval_rl"):
        assert node in done.out
    assert "tiny: 17 stages" in done.out
    # Pretrain 2, two passes of midtrain 2, sft 1 and grpo 6; 2 prompts x 2 samples x 6 updates, twice.
    assert f"{2 + 2 * (2 + 1 + 6)} updates" in done.out
    assert f"{192 * (2 + 2 * (2 + 1))} training tokens".replace("1536", "1,536") in done.out
    assert "48 RL and pair samples" in done.out
    assert "to do" in done.out


def test_a_dry_run_of_the_shipped_demo(polm: Cli, tmp_path: Path) -> None:
    done = polm("run", "demo", "--dry-run")
    assert done.code == 0
    assert "s0/c2/remit/grpo" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("inline")
def test_a_run_and_what_can_be_done_with_it(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact)))
    assert "no runs in runs" in polm("runs", "ls").out
    done = polm("run", "tiny.yaml")
    assert (done.code, done.err) == (0, "")
    assert "[ 17/17] s0/c1/remit/eval_rl" in done.out
    assert (tmp_path / "runs" / "tiny" / "report.html").stat().st_size > 5000
    assert "report: runs/tiny/report.html" in done.out
    mark = (tmp_path / "runs/tiny/store").stat().st_mtime_ns

    again = polm("run", "tiny.yaml")
    assert "17 stages were there already" in again.out
    assert (tmp_path / "runs/tiny/store").stat().st_mtime_ns == mark

    assert "17/17 stages" in polm("runs", "ls").out
    shown = polm("runs", "show", "tiny").out
    assert shown.count(" done ") == 17
    assert "store/pretrain-" in shown
    (tmp_path / "runs/tiny/report.html").unlink()
    assert polm("report", "runs/tiny", "--out", "elsewhere.html").code == 0
    assert "<html" in (tmp_path / "elsewhere.html").read_text()
    assert "done" in polm("run", "tiny.yaml", "--dry-run").out

    # Other settings: what still fits stays, the rest is stale.
    # Roots and the control's midtrain, sft and two evaluations; the arm's guide is another model.
    assert "7 stages were there already" in polm("run", "tiny.yaml", "grpo.seed=5", "--runs", "runs").out
    before = {p.name for p in (tmp_path / "runs/tiny/store").iterdir() if p.is_dir()}
    removed = polm("runs", "rm", "tiny", "--stale", "--yes")
    assert removed.code == 0
    after = {p.name for p in (tmp_path / "runs/tiny/store").iterdir() if p.is_dir()}
    named = {node["artifact"][6:] for node in json.loads((tmp_path / "runs/tiny/run.json").read_text())["nodes"]}
    assert after == named < before
    assert removed.out.count("remove ") == len(before - after)

    with lock(tmp_path / "runs/tiny/.lock", "x"):
        busy = polm("runs", "rm", "tiny", "--yes")
        assert busy.code == 2
        assert f"is in use by process {os.getpid()}" in busy.err
        busy = polm("run", "tiny.yaml")
        assert busy.code == 2
        assert f"the run runs/tiny is in use by process {os.getpid()}" in busy.err
    assert polm("runs", "rm", "tiny", "--yes").code == 0
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.usefixtures("inline")
def test_a_damaged_artifact_of_a_run(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact, arms={})))
    assert polm("run", "tiny.yaml").code == 0
    folder = (tmp_path / "runs/tiny/s0/c0/ntp/sft").resolve()
    (folder / "model" / "model.safetensors").write_bytes(b"short")
    done = polm("run", "tiny.yaml")
    assert done.code == 2
    assert "model/model.safetensors has 5 bytes, the manifest says" in done.err
    assert "Remove the folder and run the same command again" in done.err
    key = read_manifest(folder)["key"]
    shutil.rmtree(folder)
    assert polm("run", "tiny.yaml").code == 0
    assert read_manifest(folder)["key"] == key


@pytest.mark.usefixtures("inline")
def test_a_mistake_within_a_run(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(artifact("data"), data)
    lines = (data / "sft.jsonl").read_text().splitlines()
    (data / "sft.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact)))
    done = polm("run", "tiny.yaml", "data=data")  # a plain value for a section with a path
    assert done.code == 2
    assert "error: s0/data: data/sft.jsonl:4: not valid JSON" in done.err
    assert "Traceback" not in done.err
    # A run that stopped can be looked at.
    assert "0/17 stages" in polm("runs", "ls").out
    assert "pending" in polm("runs", "show", "tiny").out
    assert polm("report", "runs/tiny").code == 0
    (data / "sft.jsonl").write_text("\n".join(lines))
    assert polm("run", "tiny.yaml", "data=data").code == 0


@pytest.mark.usefixtures("inline")
def test_a_stage_that_fails_is_told(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the progress that every stage leaves for the parent, and nothing of it left behind."""
    recipe = validate(Recipe, recipe_of(artifact, arms={}), "a test")
    plan = runner.build_plan(recipe, build_graph(recipe), tmp_path / "run")
    reported: dict[str, Any] = {}
    monkeypatch.setattr(runner, "REPORT_SECONDS", 0.0)
    replace = runner._replace

    def watch_file(path: Path, text: str) -> None:
        replace(path, text)
        reported.setdefault(path.name, []).append(runner.last_line(path))

    monkeypatch.setattr(runner, "_replace", watch_file)
    broken = plan.folder("s0/c0/ntp/grpo")
    broken.mkdir(parents=True)
    (broken / "of_the_user.txt").write_text("mine")
    events: list[tuple[str, str]] = []
    with pytest.raises(StoreError, match=r"s0/c0/ntp/grpo: .* holds no artifact of ours"):
        runner.run_graph(plan, workers=1, watch=lambda e: events.append((e.kind, e.node.id)))
    assert events[-1] == ("failed", "s0/c0/ntp/grpo")
    for node in ("s0/pretrain", "s0/c0/ntp/eval_base"):
        lines = reported[runner.progress_file(plan.folder(node)).name]
        assert lines[-1]["update"] == lines[-1]["num_updates"]
    assert list((tmp_path / "run" / "store").glob(".*.progress")) == []


@pytest.mark.usefixtures("inline")
def test_comparing_runs(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact)))
    assert polm("run", "tiny.yaml").code == 0
    assert polm("run", "tiny.yaml", "name=other", "midtrain.updates=3").code == 0
    done = polm("compare", "runs/tiny", "runs/other", "--out", "page.html")
    assert (done.code, done.err) == (0, "")
    assert "midtrain.updates" in done.out
    assert "the same data" in done.out
    assert "One common seed, so nothing is shown" in done.out
    assert "comparison: page.html" in done.out
    assert "other against tiny" in (tmp_path / "page.html").read_text()
    for words, message in (
        (("runs/tiny",), "polm compare takes two runs, or one run with --arms A B; found 1"),
        (("runs/tiny", "runs/other", "--arms", "ntp", "remit"), "takes one run with --arms A B; found 2"),
        (("runs/tiny", "--arms", "ntp", "remit"), "nothing to compare: ntp has remit against"),
        (("runs/tiny", "gone"), "gone: found no folder"),
        (("runs/tiny", "runs/tiny"), "runs/tiny is given twice"),
    ):
        done = polm("compare", *words)
        assert done.code == 2
        assert message in done.err


@pytest.mark.usefixtures("inline")
def test_a_report_is_opened(polm: Cli, artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_of(artifact, arms={})))
    assert polm("run", "tiny.yaml").code == 0
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    done = polm("report", "runs/tiny", "--open")
    page = tmp_path / "runs/tiny/report.html"
    assert opened == [page.as_uri()]
    assert "no browser" not in done.out
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    done = polm("report", "runs/tiny", "--open")
    assert done.code == 0
    assert f"no browser could be opened; open {page} yourself" in done.out
    polm("report", "runs/tiny")
    assert len(opened) == 1


def test_a_report_of_one_stage(polm: Cli, artifact: Any, tmp_path: Path) -> None:
    done = polm("report", str(artifact("rejection")), "--out", "page.html")
    assert done.code == 0
    assert "answers of 64 kept, to" in " ".join(done.out.split())
    assert "what was left out" in done.out
    assert '<section id="answers">' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "gone"), "no recipe 'gone': neither a file nor a shipped recipe"),
        (("run", "gone.yaml"), "no recipe at gone.yaml; shipped recipes: "),
        (("run", "demo", "cycle=3"), "unknown key 'cycle'; did you mean 'cycles'?"),
        (("run", "demo", "midtrain.epz=3"), "unknown key 'midtrain.epz'; did you mean 'eps'?"),
        (("run", "demo", "--dry-run", "seeds=x"), "seeds: found 'x'"),
        (("report", "nowhere"), "nowhere: found no folder, expected the folder of a run"),
        (("compare", "nowhere", "there"), "nowhere: found no folder, expected the folder of a run"),
        (("evidence",), "evidence: found no */result.json, expected at least one"),
        (("runs", "show", "gone"), "runs/gone: found no folder"),
        (("runs", "rm", "gone"), "runs/gone is not a run (no run.json); `polm runs ls` lists them"),
    ],
)
def test_mistakes_with_runs(polm: Cli, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = polm(*words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_removed_without_a_yes(polm: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"nodes": []}')
    monkeypatch.setattr("typer.confirm", lambda *_: False)
    assert polm("runs", "rm", "x").code == 0
    assert folder.is_dir()
    assert polm("runs", "rm", "x", "--stale").code == 0  # a run without a store yet


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_the_page_of_evidence(polm: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "speed"
    folder.mkdir(parents=True)
    claims = [build_claim("x", metric="s", arm="a", control="b", differences=[1.0, 1.1], better="higher")]
    write_claims(folder / "result.json", claims)
    (folder / "README.md").write_text("# Speed\n\n**Question.** How fast?\n")
    assert "evidence: " in polm("evidence", "mine").out
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "(../mine/speed/README.md)" in page
    assert polm("evidence", "mine", "--out", "page.md").code == 0
    assert (tmp_path / "page.md").read_text() == page.replace("../mine", "mine")


def test_version_and_help(polm: Cli) -> None:
    assert polm("version").out.strip() == __version__
    helped = polm("--help")
    assert helped.code == 0
    for name in (*STAGES, "run", "runs", "report", "compare", "evidence"):
        assert name in helped.out
    assert polm("sf").code == 2  # no such command


def test_help_is_fast() -> None:
    """Nothing heavy is imported for the list of commands."""
    code = "import sys, polm.apps.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_that_quotes_data_cannot_drive_the_terminal(polm: Cli, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft.jsonl").write_text(json.dumps({"mess\x1b[31mages\u202e": 1}) + "\n")
    done = polm("data", "data.source=folder", "data.path=data", "out=out")
    assert done.code == 2
    assert "sft.jsonl:1" in done.err
    assert "\x1b[31m" not in done.err
    assert "\u202e" not in done.err


# ---- judges --------------------------------------------------------------------------------------------------------


def test_a_judge_on_a_server(polm: Cli, chat_server: Any, tmp_path: Path) -> None:
    server = chat_server(
        lambda body, _: f"[[{'BA'['<answer_a>' + chr(10) + 'good' in body['messages'][0]['content']]}]]"
    )
    write(tmp_path / "pairs.jsonl", *({"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(3)))
    words = ["judging.verdict=text", f"judging.endpoint.url={server.url}", "judging.endpoint.model=m"]
    done = polm("judge", "data=pairs.jsonl", "out=out/labels", *words)
    assert done.code == 0, done.err
    assert "3 pairs, agreement 100.0%" in done.out
    assert "ledger: pairs 3, equal 0, preferred 3" in done.out
    assert len(list((tmp_path / "out" / ".replies").rglob("*.json"))) == 6
    done = polm("judge", "data=pairs.jsonl", "out=out/other", *words, "judging.endpoint.api_key_env=NO_SUCH_KEY")
    assert done.code == 2
    assert "the environment variable NO_SUCH_KEY is not set" in done.err
    done = polm("judge", "data=pairs.jsonl", "out=out/other", "judging.orders=both")
    assert "judging.orders: found 'both'" in done.err


@pytest.mark.usefixtures("inline")
def test_self_rewarding_by_words(polm: Cli, build_tiny: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    save_model(build_tiny(len(byte_tokenizer), max_positions=128), byte_tokenizer, tmp_path / "model")
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "prompts.jsonl", *({"prompt": f"say {letter}"} for letter in "abcdef"))
    judge = {"verdict": "logprobs", "score_prompt": "{question}|{answer}|"}
    words = ["base=model", "data.path=in", "iterations=1", "judge.num_prompts=4", "judge.max_new_tokens=6"]
    words += [f"judge.judging={json.dumps(judge)}", "dpo.epochs=null", "dpo.updates=1", "dpo.bin_tokens=256"]
    done = polm("run", "self_rewarding", *words, "--dry-run")
    assert done.code == 0, done.err
    assert "self_rewarding: 3 stages" in done.out
    done = polm("run", "self_rewarding", *words)
    assert done.code == 0, done.err
    assert "s0/c1/self/dpo" in done.out
    assert "mean grade" in done.out
    assert "agreement" not in done.out  # a column that would say nothing
    # What the judge said stays when artifacts of earlier settings go.
    assert polm("run", "self_rewarding", *words, "dpo.updates=2").code == 0
    assert polm("runs", "rm", "self_rewarding", "--stale", "--yes").code == 0
    store = tmp_path / "runs" / "self_rewarding" / "store"
    assert len(list(store.glob("dpo-*"))) == 1
    assert list((store / ".replies").rglob("*.json"))
    assert "missing" not in polm("report", "runs/self_rewarding").err
    done = polm("run", "self_rewarding", *words, "judge.mode=relabel")
    assert "judge.mode must be sample" in done.err
