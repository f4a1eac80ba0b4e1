"""`polm data`: write a data set folder from embedded tasks, published word problems, your folder or your files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from polm.data.benchmarks import BenchmarkItem, parse_plain_number, read_benchmark_folder
from polm.data.build import build_files_dataset
from polm.data.readers import (
    has_answers,
    iterate_conversations,
    iterate_documents,
    iterate_feedback,
    iterate_preferences,
    read_any_prompts,
    read_prompts,
    read_stepwise,
)
from polm.data.records import Prompt
from polm.data.word_problems import build_word_problems_dataset
from polm.demo.corpus import build_demo_dataset
from polm.errors import BadRecordError, DataError
from polm.recipe_data import DataStage, DemoData, FilesData, FolderData, WordProblemsData
from polm.rewards.verify import VERIFIERS
from polm.stages.common import Context, Stage, StageResult

READERS: dict[str, Callable[[Path], Iterable[object]]] = {
    "pretrain.jsonl": iterate_documents,
    "midtrain.jsonl": iterate_documents,
    "sft.jsonl": iterate_conversations,
    "preferences.jsonl": iterate_preferences,
    "feedback.jsonl": iterate_feedback,
    "stepwise.jsonl": read_stepwise,
    "prompts.jsonl": read_any_prompts,
}

# Files of a folder whose bad records are copied, and counted by this word: the stage that learns from them decides.
COUNTED = {
    "sft.jsonl": ("conversations", iterate_conversations),
    "preferences.jsonl": ("pairs", iterate_preferences),
    "feedback.jsonl": ("answers", iterate_feedback),
    "stepwise.jsonl": ("solutions", read_stepwise),
}


def run(settings: DataStage, context: Context) -> StageResult:
    """Build the folder; its `summary.json` says what is in it and what was left out."""
    match settings.data:
        case DemoData() as demo:
            summary = build_demo_dataset(context.workdir, **demo.model_dump(exclude={"source"}))
        case WordProblemsData() as real:
            summary = build_word_problems_dataset(
                real.path, context.workdir, seed=real.seed, holdout_share=real.holdout_share
            )
        case FolderData() as folder:
            summary = copy_folder(folder.path, context.workdir)
        case FilesData() as files:
            summary = build_files_dataset(files, context.workdir)
            check_questions(context.workdir)
    missing = [name for name in settings.needs if not (context.workdir / name).exists()]
    if missing:
        raise DataError(
            f"the data set lacks {', '.join(missing)}, which later stages read; add them to {_place(settings)}"
        )
    ledger = {k: v for k, v in summary.get("ledger", {}).items() if isinstance(v, int)}
    counts = {f"records/{name}": info["num_records"] for name, info in summary["files"].items()}
    return StageResult(counts, ledger)


def _place(settings: DataStage) -> str:
    return str(getattr(settings.data, "path", "the data set"))


def check_verifiers(path: Path, items: Iterable[Prompt | BenchmarkItem]) -> None:
    """Every question must name a verifier that exists, and an answer that the verifier can read."""
    for number, item in enumerate(items, start=1):
        if item.verifier not in VERIFIERS:
            raise DataError(
                f"{path}: question {number} names the verifier {item.verifier!r}; there are {', '.join(VERIFIERS)}"
            )
        if item.verifier in ("number", "expression") and parse_plain_number(item.answer) is None:
            raise DataError(
                f"{path}: question {number}: the verifier {item.verifier!r} needs a number as the answer, found "
                f"{item.answer!r:.80}; correct it, or use the verifier exact or math"
            )


def check_questions(folder: Path) -> None:
    """`check_verifiers` for everything in a data set folder that has an answer."""
    if (folder / "prompts.jsonl").is_file() and has_answers(folder / "prompts.jsonl"):
        check_verifiers(folder / "prompts.jsonl", read_prompts(folder / "prompts.jsonl"))
    if (folder / "benchmarks").is_dir():
        for name, items in read_benchmark_folder(folder / "benchmarks").items():
            check_verifiers(folder / "benchmarks" / f"{name}.jsonl", items)


def copy_folder(source: Path, out: Path) -> dict[str, Any]:
    """Check a data set folder of the user's line by line, and copy it into the store."""
    if not source.is_dir():
        raise DataError(f"no data set folder at {source}; it should hold {', '.join(READERS)} and benchmarks/*.jsonl")
    files: dict[str, Any] = {}
    bad: Counter[str] = Counter()
    readers = dict(READERS)
    for name, (word, read_good) in COUNTED.items():
        readers[name] = partial(read_good, on_bad=partial(_count_bad, bad, word))
    for name, read in readers.items():
        if (source / name).is_file():
            files[name] = {"num_records": sum(1 for _ in read(source / name))}
            shutil.copyfile(source / name, out / name)
    if not files:
        found = ", ".join(sorted(p.name for p in source.iterdir())[:10]) or "nothing"
        raise DataError(f"{source} holds none of {', '.join(READERS)} (found: {found})")
    check_questions(source)
    if (source / "benchmarks").is_dir():
        for name, items in read_benchmark_folder(source / "benchmarks").items():
            files[f"benchmarks/{name}.jsonl"] = {"num_records": len(items)}
        shutil.copytree(source / "benchmarks", out / "benchmarks", dirs_exist_ok=True)
    summary = {"files": files, "ledger": {"records": sum(info["num_records"] for info in files.values())}}
    summary["ledger"] |= dict(bad)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _count_bad(bad: Counter[str], word: str, error: BadRecordError) -> None:
    bad[f"{word}_{error.reason}"] += 1


STAGE = Stage(
    "data",
    "produce",
    DataStage,
    run,
    inputs=(),
    version=2,
    summary="write a data set folder (`polm data inspect FILE` only looks)",
)
