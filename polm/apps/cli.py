"""The command line: `polm run`, `polm runs`, `polm report`, and one command a stage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from polm import __version__
from polm.config import Settings, find_recipe, load_settings, read_yaml
from polm.errors import UserError

console = Console(soft_wrap=False)
app = typer.Typer(
    help="Post-training of language models as a flywheel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
runs_app = typer.Typer(help="Look at runs and take them away.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

RUNS = Path("runs")
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, dotted for sections: sft.epochs=2")]
RunsDir = Annotated[Path, typer.Option("--runs", help="folder of runs")]


def main() -> None:
    """Entry point: a user's mistake prints its text and exits with 2, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def print_tables(loaded: Any, *, whole: bool = False) -> None:
    """The report's tables in the terminal: one screen, or with `whole` every benchmark at every point."""
    from polm.report.compare import compute_rows
    from polm.report.tables import build_summary_table, build_tables

    rows = compute_rows(loaded)
    if rows.points:
        console.print(build_summary_table(rows))
    for table in build_tables(loaded) if whole else ():
        console.print(table)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped one")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print recipe, graph and arithmetic; do nothing")] = False,
    runs: RunsDir = RUNS,
) -> None:
    """Run a recipe's whole flywheel; run it again to go on where it stopped."""
    from polm.apps.show import RunBar, print_plan
    from polm.flywheel.graph import build_graph
    from polm.flywheel.runner import build_plan, run_graph
    from polm.recipe import Recipe
    from polm.report.html import write_report
    from polm.report.load import load_run

    settings = load_settings(Recipe, find_recipe(recipe), overrides or ())
    plan = build_plan(settings, build_graph(settings), runs / settings.name)
    workers = settings.workers or os.cpu_count() or 1
    if dry_run:
        console.print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), markup=False)
        print_plan(console, plan, workers)
        return
    with RunBar(console) as bar:
        run_graph(plan, workers=workers, watch=bar)
    report = write_report(plan.run_dir, plan.run_dir / "report.html")
    print_tables(load_run(plan.run_dir))
    console.print(f"report: {report}", markup=False, soft_wrap=True)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run, such as runs/demo")],
    out: Annotated[Path | None, typer.Option(help="where to write; default: report.html in the run")] = None,
) -> None:
    """Write the HTML report of a run, finished or not, and print its tables."""
    from polm.report.html import write_report
    from polm.report.load import load_run

    written = write_report(run_dir, out or run_dir / "report.html")
    print_tables(load_run(run_dir), whole=True)
    console.print(f"report: {written}", markup=False, soft_wrap=True)


@runs_app.command("ls")
def runs_ls(runs: RunsDir = RUNS) -> None:
    """List runs with how much of each is done."""
    from polm.report.load import load_run

    found = sorted(p.parent for p in runs.glob("*/run.json"))
    if not found:
        console.print(f"no runs in {runs}")
    for folder in found:
        nodes = load_run(folder, with_details=False).nodes
        done = sum(node.status != "pending" for node in nodes)
        size = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file())
        console.print(f"{folder.name:<24} {done:>4}/{len(nodes)} stages  {size / 1e6:8.1f} MB", markup=False)


@runs_app.command("show")
def runs_show(name: str, runs: RunsDir = RUNS) -> None:
    """Show the stages of a run: status, time, key, folder."""
    from polm.report.load import load_run

    loaded = load_run(runs / name)
    for node in loaded.nodes:
        seconds = f"{node.manifest.seconds:8.1f} s" if node.manifest else " " * 10
        console.print(f"{node.id:<32} {node.status:<8} {seconds}  {node.spec.artifact}", markup=False, soft_wrap=True)
    print_tables(loaded)


@runs_app.command("rm")
def runs_rm(
    name: str,
    runs: RunsDir = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="only artifacts that the recipe no longer names")] = False,
) -> None:
    """Remove a run, or with --stale what earlier settings left in its store."""
    from polm.flywheel.store import lock

    folder = runs / name
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is not a run (no run.json); `polm runs ls` lists them")
    with lock(folder / ".lock", f"the run {folder}"):
        doomed = [folder]
        if stale:
            kept = {node["artifact"] for node in json.loads((folder / "run.json").read_text())["nodes"]}
            doomed = [p for p in (folder / "store").glob("*") if f"store/{p.name}" not in kept and p.is_dir()]
        for path in doomed:
            console.print(f"remove {path}", markup=False)
        if doomed and (yes or typer.confirm("sure?")):
            for path in doomed:
                shutil.rmtree(path)


def run_stage(name: str, recipe: str | None, words: Sequence[str]) -> None:
    """Run one stage on its own, into `out`. Words are inputs or settings; `midtrain.base=frozen` is the setting `base`
    where `base=…` is an input."""
    from polm.apps.show import StageBar, describe_summary
    from polm.flywheel.store import Work, execute, external_key
    from polm.stages.common import Context
    from polm.stages.table import STAGES

    stage = STAGES[name]
    roles = (*stage.inputs, *stage.optional_inputs, "out")
    pairs = [word.split("=", 1) for word in words if word.split("=", 1)[0] in roles and "=" in word]
    given = dict(pairs)
    if len(given) < len(pairs):
        twice = next(role for role, _ in pairs if sum(other == role for other, _ in pairs) > 1)
        raise UserError(f"polm {name}: {twice}=… is given more than once; give it once")
    prefix = "" if name in stage.settings.model_fields else f"{name}."
    overrides = [word.removeprefix(prefix) for word in words if word.split("=", 1)[0] not in roles]
    missing = [role for role in (*stage.inputs, "out") if not given.get(role)]
    if missing:
        usage = " ".join(f"{role}=…" for role in (*stage.inputs, "out"))
        raise UserError(f"polm {name} needs {', '.join(missing)}: polm {name} {usage} [setting=value …]")
    settings = load_stage_settings(stage.settings, name, recipe, overrides)
    inputs = {role: value for role, value in given.items() if role != "out"}
    keys = {role: external_key(value) for role, value in inputs.items()}
    work = Work(stage, settings, inputs, keys, Path(given["out"]))
    with StageBar(console, name) as bar:
        say = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
        manifest = execute(work, Context(work.folder, inputs, report=bar, say=say))
    console.print(f"{name}: {describe_summary(manifest['summary'])} ({manifest['seconds']:.1f} s) -> {work.folder}")
    if manifest["ledger"]:
        console.print("ledger: " + ", ".join(f"{k} {v:,}" for k, v in manifest["ledger"].items()), markup=False)


def load_stage_settings(kind: type[Settings], name: str, recipe: str | None, overrides: Sequence[str]) -> Settings:
    """A stage's settings from the section of a whole recipe, from a file of its own, or from defaults.

    A recipe has no section `annotate`: there it means the documents that the recipe's mid-training will read.
    """
    from polm.flywheel.graph import annotate_settings
    from polm.recipe import MidtrainSettings

    file = find_recipe(recipe) if recipe else None
    values = read_yaml(file)[0] if file is not None else {}
    is_whole = "name" in values
    if name == "data" and (is_whole or "data" in values):
        words = [f"data={json.dumps(values['data'])}"] if "data" in values else []
        return load_settings(kind, None, [*words, *overrides])
    if name == "annotate" and is_whole:
        section = file if isinstance(values.get("midtrain"), dict) else None
        given = annotate_settings(load_settings(MidtrainSettings, section, (), section="midtrain"))
        words = [f"{field}={json.dumps(value)}" for field, value in given.model_dump(mode="json").items()]
        return load_settings(kind, None, [*words, *overrides])
    if is_whole and not isinstance(values.get(name), dict):  # a recipe that leaves the stage at its defaults
        file = None
    return load_settings(kind, file, overrides, section=name)


def _stage_command(name: str) -> Callable[..., Any]:
    def command(
        words: Annotated[list[str] | None, typer.Argument(help="inputs, out=FOLDER and settings, as key=value")] = None,
        recipe: Annotated[str | None, typer.Option("--recipe", help="a recipe, or a file of this stage")] = None,
    ) -> None:
        run_stage(name, recipe, words or [])

    return command


# Names and help are repeated here so that `polm --help` does not have to import torch; a test compares them.
STAGE_HELP = {
    "data": "write a data set folder",
    "tokenizer": "train a tokenizer",
    "pretrain": "next-token prediction from random weights",
    "annotate": "log-probabilities of a frozen model over a data set",
    "midtrain": "anneal a base, tokens weighted by a reference (ntp, remit, rho1, distill, shuffled)",
    "sft": "supervised fine-tuning",
    "pairs": "preference pairs from a model's own samples",
    "dpo": "preference optimisation (DPO, IPO, KTO, ORPO, SimPO and others)",
    "grpo": "reinforcement learning with verifiable rewards",
    "eval": "benchmarks and likelihood",
}
for _name, _help in STAGE_HELP.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)
