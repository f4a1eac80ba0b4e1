"""Read a run folder into frozen records: what was planned, what is done, what it cost and what came out.

A run that is still going is readable: a node without a manifest is "pending", and a half-written last line of its
metrics is left out. A file that is damaged in any other way is a StoreError that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter

from polm.errors import StoreError
from polm.report.made import NOTHING_MADE, ROLLOUT_STAGES, Made, load_made
from polm.report.read import read_json, read_jsonl, read_text

Metrics = Mapping[str, Any]
KEY_LENGTH = 12  # digits of a key that are shown


@dataclass(frozen=True)
class Manifest:
    """What a finished stage left behind: cost, inputs by key, its flat summary and its token ledger."""

    key: str
    stage: str
    version: str | int = ""
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    finished: str = ""
    seconds: float | None = None
    peak_rss_mb: float | None = None
    threads: int | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkResult:
    """The scores of one benchmark as the evaluation wrote them; `nll` is in nats."""

    num_items: int
    greedy: float | None = None
    pass_at_1: Annotated[float | None, Field(alias="pass@1")] = None
    steps_at_1: Annotated[float | None, Field(alias="steps@1")] = None
    pass_at_k: Annotated[dict[int, float], Field(alias="pass@k")] = field(default_factory=dict)
    nll: float | None = None
    unparsed: float | None = None


@dataclass(frozen=True)
class Results:
    """results.json: `format` is "plain" for a base model and "chat" after SFT."""

    format: str
    benchmarks: dict[str, BenchmarkResult]
    mean: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One line of items.jsonl: a question, what the model said to it, and the verdict."""

    benchmark: str
    id: str | int
    prompt: str = ""
    answer: str | float = ""
    greedy_text: str = ""
    greedy_status: str = ""
    greedy_correct: float | None = None
    samples_correct: list[float] = field(default_factory=list)
    samples_text: list[str] = field(default_factory=list)
    steps_correct: list[float] = field(default_factory=list)
    nll: float | None = None
    nll_tokens: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluated model: the scores and the items behind them (none if items.jsonl is missing)."""

    results: Results
    items: tuple[Item, ...]


@dataclass(frozen=True)
class ScopedText:
    """One line of microscope.jsonl: a text with the numbers of each token; the first token has none."""

    kind: Literal["document", "benchmark"]
    label: str
    id: str
    num_tokens: int
    num_prompt: int
    tokens: list[str]
    logp_ref: list[float | None]
    logp_base: list[float | None]
    delta: list[float | None]
    weight: list[float | None] | None = None

    def __post_init__(self) -> None:
        lists = (self.logp_ref, self.logp_base, self.delta, self.weight)
        if any(values is not None and len(values) != len(self.tokens) for values in lists):
            raise ValueError("the lists of numbers must be as long as the list of tokens")


@dataclass(frozen=True)
class TokenMean:
    """One entry of the vocabulary (`token`) or one source of documents (`source`) over the sample."""

    count: int
    delta: float
    weight: float | None = None
    token: str = ""
    source: str = ""


@dataclass(frozen=True)
class TokenTables:
    """tokens.json: what is lifted and damped over the sample; `histogram` counts weights in bins over [0, 2].

    `shuffles` says whose weights `shuffled` deals out; files of the stage's first version do not.
    """

    weighting: str
    eps: float
    num_documents: int
    num_tokens: int
    min_count: int
    mean_delta: float
    mean_weight: float | None
    lifted: list[TokenMean]
    damped: list[TokenMean]
    sources: list[TokenMean]
    histogram: list[int]
    shuffles: str = "remit"


@dataclass(frozen=True)
class Microscope:
    """The artifact of a `microscope` stage."""

    texts: tuple[ScopedText, ...]
    tables: TokenTables


@dataclass(frozen=True)
class RolloutSample:
    """One sampled answer of RL with its verdict; `reward` where it is not the verdict's 0 or 1; `note` says why there
    is none. `judged` is false for an answer that has no reward though its status does not say so.

    `advantage` is None for the online preference methods, which have none. Where their answers meet those of another
    model, `own` is 1 for the policy's and 0 for the other side's.
    """

    text: str
    status: str
    advantage: float | None = None
    reward: float | None = None
    note: str = ""
    own: float | None = None
    judged: bool = True


@dataclass(frozen=True)
class RolloutGroup:
    """One line of an RL stage's samples.jsonl: a prompt and all its samples at the update `update`."""

    update: int
    prompt: str
    answer: str | float
    samples: list[RolloutSample]


@dataclass(frozen=True)
class NodeSpec:
    """One node as run.json describes it; `artifact` is relative to the run folder."""

    id: str
    stage: str
    key: str = ""
    artifact: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    cycle: int | None = None
    arm: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """run.json as it lies on the disk."""

    name: str
    nodes: list[NodeSpec]
    recipe: Any = None
    versions: dict[str, Any] = field(default_factory=dict)
    headline: Any = None


@dataclass(frozen=True, eq=False)
class Node:
    """A node with what is known of its artifact.

    `status` is "done" with a manifest, "shared" if an earlier node has the same artifact (its cost counts once), and
    "pending" without a manifest. `metrics` has one mapping for each logged update.
    """

    spec: NodeSpec
    status: Literal["done", "shared", "pending"]
    manifest: Manifest | None = None
    metrics: tuple[Metrics, ...] = ()
    evaluation: Evaluation | None = None
    microscope: Microscope | None = None
    rollouts: tuple[RolloutGroup, ...] = ()
    made: Made = NOTHING_MADE

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def leaf(self) -> str:
        """The last part of the id: "midtrain", "eval_rl"."""
        return self.spec.id.rsplit("/", 1)[-1]


@dataclass(frozen=True, eq=False)
class Run:
    """A whole run; compared and hashed by identity, so that what is derived from it can be cached."""

    directory: Path
    name: str
    nodes: tuple[Node, ...]
    recipe_text: str
    versions: Mapping[str, Any]
    headline: Any
    is_stage: bool = False  # not a run, but the folder of one stage that was run on its own

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the nodes, ascending."""
        return tuple(sorted({node.spec.seed for node in self.nodes if node.spec.seed is not None}))


_RUN: TypeAdapter[RunSpec] = TypeAdapter(RunSpec)
_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_RESULTS: TypeAdapter[Results] = TypeAdapter(Results)
_ITEM: TypeAdapter[Item] = TypeAdapter(Item)
_SCOPED: TypeAdapter[ScopedText] = TypeAdapter(ScopedText)
_TABLES: TypeAdapter[TokenTables] = TypeAdapter(TokenTables)
_ROLLOUT: TypeAdapter[RolloutGroup] = TypeAdapter(RolloutGroup)
_METRICS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _build_artifact_path(run_dir: Path, spec: NodeSpec) -> Path | None:
    """Where the artifact lies; a path that leads out of the run folder is refused, whoever wrote it."""
    if not spec.artifact:
        return None
    relative = PurePosixPath(spec.artifact)
    if relative.is_absolute() or ".." in relative.parts:
        raise StoreError(
            f"{run_dir / 'run.json'}: node {spec.id!r} has the artifact {spec.artifact!r}; expected a path inside the "
            "run folder, such as store/sft-3fa9c2d41b07"
        )
    return run_dir / relative


def _load_node(run_dir: Path, spec: NodeSpec, loaded: dict[Path, Node], with_details: bool) -> Node:
    folder = _build_artifact_path(run_dir, spec)
    if folder is None:
        return Node(spec, "pending")
    if folder in loaded:
        return replace(loaded[folder], spec=spec, status="shared")
    node = _load_artifact(folder, spec, with_details)
    if node.status == "done":
        loaded[folder] = node
    return node


def _load_artifact(folder: Path, spec: NodeSpec, with_details: bool) -> Node:
    """A node from the folder of its artifact, which may be there in part, or not at all."""
    manifest_file, metrics_file = folder / "manifest.json", folder / "metrics.jsonl"
    finished = manifest_file.is_file()
    has_metrics = with_details and metrics_file.is_file()
    metrics = read_jsonl(_METRICS, metrics_file, finished=finished) if has_metrics else ()
    rollouts: tuple[RolloutGroup, ...] = ()
    if with_details and spec.stage in ROLLOUT_STAGES and (folder / "samples.jsonl").is_file():
        rollouts = read_jsonl(_ROLLOUT, folder / "samples.jsonl", finished=finished)
    if not finished:
        return Node(spec, "pending", metrics=metrics, rollouts=rollouts)
    evaluation = None
    if (folder / "results.json").is_file():
        items_file = folder / "items.jsonl"
        has_items = with_details and items_file.is_file()
        items = read_jsonl(_ITEM, items_file, finished=True) if has_items else ()
        evaluation = Evaluation(read_json(_RESULTS, folder / "results.json"), items)
    microscope = None
    if with_details and (folder / "tokens.json").is_file():
        texts = read_jsonl(_SCOPED, folder / "microscope.jsonl", finished=True)
        microscope = Microscope(texts, read_json(_TABLES, folder / "tokens.json"))
    made = load_made(folder, spec.stage) if with_details else NOTHING_MADE
    return Node(spec, "done", read_json(_MANIFEST, manifest_file), metrics, evaluation, microscope, rollouts, made)


def load_stage(folder: Path) -> Run:
    """The folder of one stage that was run on its own, as a run of one node. Raises StoreError for a damaged one."""
    manifest = read_json(_MANIFEST, folder / "manifest.json")
    keys = {role: str(key) for role, key in manifest.inputs.items()}
    inputs = {role: key if key.startswith("hub:") else key[:KEY_LENGTH] for role, key in keys.items()}
    name = folder.resolve().name
    seed = manifest.config.get("seed")
    spec = NodeSpec(
        manifest.stage,
        manifest.stage,
        manifest.key,
        inputs=inputs,
        seed=seed if isinstance(seed, int) else None,
        arm=name,
        config=manifest.config,
    )
    settings = yaml.safe_dump(manifest.config, sort_keys=False, allow_unicode=True) if manifest.config else ""
    return Run(folder, name, (_load_artifact(folder, spec, True),), settings, manifest.versions, None, is_stage=True)


def load_report(folder: Path) -> Run:
    """What `polm report` is given: a run, or the folder of one finished stage."""
    if not (folder / "run.json").is_file() and (folder / "manifest.json").is_file():
        return load_stage(folder)
    if not (folder / "run.json").is_file() and (folder / ".key").is_file():
        raise StoreError(
            f"{folder}: the stage in this folder is not finished; run its command again (it goes on where it stopped), "
            "and then the report"
        )
    return load_run(folder)


def load_run(run_dir: Path, *, with_details: bool = True) -> Run:
    """Read the run folder `run_dir`. Raises StoreError if it is not one, or if a file in it is damaged.

    Without details the items and the metrics stay unread: enough to list stages, status and cost, and much faster.
    """
    run_file = run_dir / "run.json"
    if not run_file.is_file():
        found = "a folder without run.json" if run_dir.is_dir() else "no folder"
        raise StoreError(
            f"{run_dir}: found {found}, expected the folder of a run (with run.json and store/); "
            "name the folder under runs/ that `polm run` wrote, or, for a report, the `out` of a stage that is finished"
        )
    spec = read_json(_RUN, run_file)
    loaded: dict[Path, Node] = {}
    nodes = tuple(_load_node(run_dir, node, loaded, with_details) for node in spec.nodes)
    recipe_file = run_dir / "recipe.yaml"
    if recipe_file.is_file():
        recipe_text = read_text(recipe_file)
    else:
        recipe_text = json.dumps(spec.recipe, indent=2, ensure_ascii=False) if spec.recipe else ""
    return Run(run_dir, spec.name, nodes, recipe_text, spec.versions, spec.headline)
