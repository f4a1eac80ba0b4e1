"""The command line: `polm run`, `polm runs`, `polm report`, `polm compare`, and one command a stage."""

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
from polm.cores import count_cores
from polm.errors import UserError
from polm.report.escape import clean_text

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
    if sys.argv[1:3] == ["data", "inspect"]:  # `data` is a stage, whose words are not commands
        sys.argv[1:3] = ["inspect"]
    try:
        app()
    except UserError as error:
        # The text may quote data: escape sequences in it must not reach the terminal.
        words = clean_text(f"error: {error}")
        Console(stderr=True).print(words, style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def print_tables(loaded: Any, *, whole: bool = False) -> None:
    """The report's tables in the terminal: one screen, or with `whole` every benchmark at every point."""
    from polm.report.compare import compute_rows
    from polm.report.rounds import compute_rounds
    from polm.report.sections_judges import build_judges_table
    from polm.report.stage_words import describe_stage
    from polm.report.tables import build_problems_table, build_rounds_summary, build_summary_table, build_tables

    for sentence in describe_stage(loaded) if loaded.is_stage else ():
        console.print(clean_text(sentence), markup=False, highlight=False)
    rows = compute_rows(loaded)
    rounds = compute_rounds(loaded)
    if rounds is not None:
        console.print(build_rounds_summary(rounds))
    elif rows.points:
        console.print(build_summary_table(rows))
    if (judges := build_judges_table(loaded)) is not None:
        console.print(judges)
    if whole and (problems := build_problems_table(loaded)) is not None:
        console.print(problems)
    for table in build_tables(loaded) if whole else ():
        console.print(table)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped one")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print recipe, graph and arithmetic; do nothing")] = False,
    runs: RunsDir = RUNS,
) -> None:
    """Run a whole recipe (a flywheel, or self-rewarding iterations); run it again to go on where it stopped."""
    from polm.apps.live import RunBar
    from polm.apps.show import print_plan
    from polm.flywheel.kinds import build_any_graph, load_recipe
    from polm.flywheel.runner import build_plan, run_graph
    from polm.report.html import write_report
    from polm.report.load import load_run

    settings = load_recipe(find_recipe(recipe), overrides or ())
    plan = build_plan(settings, build_any_graph(settings), runs / settings.name)
    workers = settings.workers or count_cores()
    if dry_run:
        console.print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), markup=False)
        print_plan(console, plan, workers)
        return
    with RunBar(console, plan, workers) as bar:
        run_graph(plan, workers=workers, watch=bar)
    report = write_report(plan.run_dir, plan.run_dir / "report.html")
    print_tables(load_run(plan.run_dir))
    console.print(f"report: {report}", markup=False, soft_wrap=True)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run, such as runs/demo, or `out` of one stage")],
    out: Annotated[Path | None, typer.Option(help="where to write; default: report.html in the folder")] = None,
    show: Annotated[bool, typer.Option("--open", help="open the report in the browser")] = False,
) -> None:
    """Write the HTML report of a run, finished or not, or of one finished stage, and print its tables."""
    from polm.report.html import build_report, write_page
    from polm.report.load import load_report

    loaded = load_report(run_dir)
    written = write_page(build_report(loaded), out or run_dir / "report.html")
    print_tables(loaded, whole=True)
    console.print(f"report: {written}", markup=False, soft_wrap=True)
    if show:
        open_page(written)


def open_page(page: Path) -> None:
    """Open a written page in the user's browser, or say where it is."""
    import webbrowser

    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        console.print(f"no browser could be opened; open {page.resolve()} yourself", markup=False, soft_wrap=True)


@app.command()
def compare(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="two folders of runs; or one, with --arms", metavar="RUN [RUN]")
    ],
    arms: Annotated[tuple[str, str] | None, typer.Option("--arms", help="two arms of one run", metavar="A B")] = None,
    out: Annotated[Path | None, typer.Option(help="an HTML page to write")] = None,
) -> None:
    """Compare two runs, or two arms of one run: recipes, scores on the same seeds and items, costs."""
    from polm.report.compare_runs import compare_arms, compare_runs
    from polm.report.compare_show import build_comparison_page, build_comparison_tables, describe_verdict
    from polm.report.html import write_page
    from polm.report.load import load_run

    if len(run_dirs) != (1 if arms else 2):
        wanted = "one run with --arms A B" if arms else "two runs, or one run with --arms A B"
        raise UserError(f"polm compare takes {wanted}; found {len(run_dirs)}")
    loaded = [load_run(folder) for folder in run_dirs]
    found = compare_arms(loaded[0], *arms) if arms else compare_runs(*loaded)
    for table in build_comparison_tables(found):
        console.print(table)
    for sentence in (*found.notes, describe_verdict(found)):
        console.print(clean_text(sentence), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        written = write_page(build_comparison_page(found), out)
        console.print(f"comparison: {written}", markup=False, soft_wrap=True)


@app.command()
def evidence(
    folder: Annotated[Path, typer.Argument(help="folder with NAME/result.json and NAME/README.md")] = Path("evidence"),
    out: Annotated[Path | None, typer.Option(help="default: docs/evidence.md beside the folder")] = None,
) -> None:
    """Write the page of all claims, shown and not shown, from the results of the evidence scripts."""
    from polm.report.evidence import build_evidence_page
    from polm.report.html import write_page

    page = out or folder.resolve().parent / "docs" / "evidence.md"
    written = write_page(build_evidence_page(folder, page), page)
    console.print(f"evidence: {written}", markup=False, soft_wrap=True)


@app.command("inspect")
def inspect_file(
    file: Annotated[str, typer.Argument(help="a data file, a folder of them, a data set folder, or hub:OWNER/NAME")],
    tokenizer: Annotated[str | None, typer.Option(help="folder of a model or tokenizer: count in its tokens")] = None,
    context: Annotated[int, typer.Option(min=0, help="tokens; says what would be cut off. 0 = nothing")] = 0,
    format: Annotated[str | None, typer.Option(help="name of the format; default: told from the rows")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, may be given several times")] = None,
    template: Annotated[str | None, typer.Option(help="set this chat template of ours on the tokenizer")] = None,
    example: Annotated[int, typer.Option(min=1, help="the row to show")] = 1,
) -> None:
    """Show what a data file holds (also `polm data inspect`): format, counts, lengths, an example as trained on."""
    from polm.apps.inspect import list_sources, parse_columns, print_inspection
    from polm.data.inspection import inspect_source
    from polm.models.loading import load_tokenizer
    from polm.stages.pretrain import model_folder_of_tokenizer
    from polm.text.templates import apply_template

    loaded = load_tokenizer(model_folder_of_tokenizer(tokenizer)) if tokenizer is not None else None
    if template is not None:
        if loaded is None:
            raise UserError("--template needs --tokenizer PATH, whose template it sets")
        apply_template(loaded, template)
    columns = parse_columns(column or [])
    for source in list_sources(file):
        found = inspect_source(
            source, tokenizer=loaded, context=context, format=format, columns=columns, example=example
        )
        print_inspection(console, found)


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


def is_artifact(path: Path) -> bool:
    """Whether something in a store is an artifact; the replies of judges, which may have cost money, are none."""
    return path.is_dir() and not path.name.startswith(".")


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
            doomed = [p for p in (folder / "store").glob("*") if f"store/{p.name}" not in kept and is_artifact(p)]
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

    One that belongs to no whole recipe uses all cores unless it says how many; a recipe's stages run side by side. A
    recipe has no section `annotate`: there it means the documents that the recipe's mid-training will read.
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
    if name == "microscope" and is_whole and isinstance(values.get("midtrain"), dict):
        # How documents are cut stands in the recipe's midtrain; which weighting to look at is the caller's choice.
        cut = load_settings(MidtrainSettings, file, (), section="midtrain").model_dump(mode="json")
        words = [f"{field}={json.dumps(cut[field])}" for field in ("bin_tokens", "too_long", "precision", "threads")]
        overrides = [*words, *overrides]
    if is_whole and not isinstance(values.get(name), dict):  # a recipe that leaves the stage at its defaults
        file = None
    settings = load_settings(kind, file, overrides, section=name)
    if "threads" in kind.model_fields and "threads" not in settings.model_fields_set and not is_whole:
        return settings.model_copy(update={"threads": 0})  # nothing runs beside it
    return settings


def _stage_command(name: str) -> Callable[..., Any]:
    def command(
        words: Annotated[list[str] | None, typer.Argument(help="inputs, out=FOLDER and settings, as key=value")] = None,
        recipe: Annotated[str | None, typer.Option("--recipe", help="a recipe, or a file of this stage")] = None,
    ) -> None:
        run_stage(name, recipe, words or [])

    return command


# Names and help are repeated here so that `polm --help` does not have to import torch; a test compares them.
STAGE_HELP = {
    "data": "write a data set folder (`polm data inspect FILE` only looks)",
    "tokenizer": "train a tokenizer",
    "pretrain": "next-token prediction from random weights",
    "annotate": "log-probabilities of a frozen model over a data set",
    "microscope": "which tokens a reference lifts and damps",
    "midtrain": "anneal a base, tokens weighted by a reference (ntp, remit, rho1, distill, plausible, shuffled)",
    "sft": "supervised fine-tuning",
    "rejection": "a model's own best answers as SFT data (rejection sampling, RAFT)",
    "pairs": "preference pairs from a model's own samples",
    "judge": "an AI judge's labels on pairs, on answers, or on a model's own samples (RLAIF)",
    "constitution": "answers criticised and revised by written principles (Constitutional AI)",
    "dpo": "preference optimisation (DPO, IPO, KTO, ORPO, SimPO and others)",
    "online": "online preference optimisation (online DPO, XPO, Nash-MD)",
    "reward_model": "a reward model from preference pairs",
    "process_reward_model": "a process reward model from labelled steps",
    "grpo": "reinforcement learning with verifiable rewards",
    "rloo": "reinforcement learning with a leave-one-out baseline",
    "reinforce_pp": "reinforcement learning by REINFORCE++",
    "remax": "reinforcement learning with the greedy answer as the baseline",
    "ppo": "reinforcement learning by PPO, with a critic",
    "merge_adapter": "an adapter and its base as one ordinary checkpoint",
    "eval": "benchmarks and likelihood",
}
for _name, _help in STAGE_HELP.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)
