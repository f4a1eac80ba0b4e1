"""From a user's own files to a data set folder: one place where every format is converted.

Each source is read once, record by record, and written as canonical JSON lines without duplicates and contaminated
records; then the sources of a role are mixed. The ledger counts, for each role: `read`, `dropped_prompts_differ`,
`media_dropped`, `duplicates`, `contaminated` (and by benchmark), `kept`, `columns_ignored/NAME`, `verifier_chosen`,
and for a mixture `mixed`, `repeated` and `left_over`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polm.data.benchmarks import read_benchmark, read_benchmark_folder
from polm.data.clean import Contamination, fingerprint_record
from polm.data.formats import FORMATS, build_records, open_source
from polm.data.mixture import mix
from polm.data.readers import write_jsonl
from polm.data.records import (
    Conversation,
    Document,
    Feedback,
    Preference,
    Prompt,
    Record,
    Row,
    Stepwise,
    build_row,
    list_texts,
)
from polm.errors import BadRecordError, DataError, MediaError
from polm.recipe_data import FilesData, FileSource, MixedSource

# Role -> (file of a data set folder, what its records are).
ROLES: dict[str, tuple[str, type[Record]]] = {
    "pretrain": ("pretrain.jsonl", Document),
    "midtrain": ("midtrain.jsonl", Document),
    "sft": ("sft.jsonl", Conversation),
    "preferences": ("preferences.jsonl", Preference),
    "feedback": ("feedback.jsonl", Feedback),
    "stepwise": ("stepwise.jsonl", Stepwise),
    "prompts": ("prompts.jsonl", Prompt),
}
PARTS = ".parts"
PUBLISHED = "published"  # instead of a format: one of `benchmarks.BENCHMARKS`, below the folder `path`


def build_files_dataset(settings: FilesData, out: Path) -> dict[str, Any]:
    """Write the data set folder `out` from the user's files and return what `summary.json` holds.

    Raises:
        DataError: no source at all, a file that cannot be read or is of another use than its role, or no record left.
    """
    roles: dict[str, tuple[MixedSource, ...]] = {
        "pretrain": settings.pretrain,
        "midtrain": settings.midtrain,
        "sft": settings.sft,
        "preferences": settings.preferences,
        "feedback": settings.feedback,
        "stepwise": settings.stepwise,
        "prompts": settings.prompts,
    }
    if not any(roles.values()):
        raise DataError(f"the data section names no file; give a list of sources for some of {', '.join(roles)}")
    contamination = _read_questions(settings)
    files: dict[str, Any] = {}
    ledger: Counter[str] = Counter()
    for role, sources in roles.items():
        if sources:
            files[ROLES[role][0]] = _build_role(settings, role, sources, contamination, out, ledger)
    if settings.benchmarks is not None:
        for name, items in read_benchmark_folder(settings.benchmarks).items():
            files[f"benchmarks/{name}.jsonl"] = {"num_records": len(items)}
        shutil.copytree(settings.benchmarks, out / "benchmarks", dirs_exist_ok=True)
    summary = {"files": files, "ledger": dict(ledger)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _read_questions(settings: FilesData) -> Contamination | None:
    """The questions that no record may hold: of the benchmarks that go into the folder, and of those named."""
    questions: dict[str, list[str]] = {}
    if settings.benchmarks is not None:
        for name, items in read_benchmark_folder(settings.benchmarks).items():
            questions[name] = [item.prompt for item in items]
    for name, source in settings.decontaminate.items():
        if source.format == PUBLISHED:
            found: Iterable[str] = (item.prompt for item in read_benchmark(name, Path(source.path)))
        else:
            found = _read_question_source(source)
        questions.setdefault(name, []).extend(found)
    return Contamination(questions, settings.ngram) if questions else None


def _read_question_source(source: FileSource) -> Iterator[str]:
    """The prompt of each record: of a conversation the first user message, of a document all of it."""
    detection, rows = open_source(source.path, source.format, source.columns)
    for record in build_records(detection.format, rows, Counter()):
        messages = getattr(record, "messages", None) or getattr(record, "prompt", None)
        if isinstance(messages, list):
            yield next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
        else:
            yield list_texts(record)[0]


def _build_role(
    settings: FilesData,
    role: str,
    sources: Sequence[MixedSource],
    contamination: Contamination | None,
    out: Path,
    ledger: Counter[str],
) -> dict[str, Any]:
    """Clean each source into a part, mix the parts into the role's file, and return its entry in the summary."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise DataError(f"data.{role}: {len(weights)} of {len(sources)} sources have a weight; give all or none one")
    own: Counter[str] = Counter()
    seen: set[bytes] | None = set() if settings.deduplicate else None
    parts: list[Path] = []
    found: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        before, part = own["kept"], out / PARTS / f"{role}-{number}.jsonl"
        rows = _clean(settings, role, source, seen, contamination, own, found)
        write_jsonl(part, rows)
        if own["kept"] == before:
            raise DataError(f"data.{role}: no record of {source.path} is left; the ledger so far: {_describe(own)}")
        parts.append(part)
        found[-1]["num_kept"] = own["kept"] - before
    name = ROLES[role][0]
    num_records = _join(parts, weights, settings, out / name, own)
    shutil.rmtree(out / PARTS)
    ledger.update({f"{role}/{word}": count for word, count in own.items()})
    return {"num_records": num_records, "sources": found}


def _clean(
    settings: FilesData,
    role: str,
    source: MixedSource,
    seen: set[bytes] | None,
    contamination: Contamination | None,
    ledger: Counter[str],
    found: list[dict[str, Any]],
) -> Iterator[Row]:
    """The rows of a source that stay, in canonical form; what goes is counted."""
    detection, rows = open_source(source.path, source.format, source.columns)
    kind = ROLES[role][1]
    if detection.format.kind is not kind:
        fitting = ", ".join(format.name for format in FORMATS.values() if format.kind is kind)
        raise DataError(
            f"data.{role}: {source.path} has the format {detection.format.name} ({detection.evidence}); {role} takes "
            f"{fitting}. Move the file to the right role, map its columns, or name its format"
        )
    found.append({"path": source.path, "format": detection.format.name})
    counted = _count_rows(rows, role, ledger)
    for record in build_records(detection.format, counted, ledger, partial(_drop_bad, settings, role, ledger)):
        if not isinstance(record, Document) and record.media:
            if settings.media == "error":
                raise MediaError(
                    f"data.{role}: record {ledger['read']} of {source.path} refers to {record.media[0]}, which a text "
                    "model cannot see; set data.media=drop to leave such records out (they are counted)"
                )
            ledger["media_dropped"] += 1
            continue
        if seen is not None:
            key = fingerprint_record(record)
            if key in seen:
                ledger["duplicates"] += 1
                continue
            seen.add(key)
        if contamination is not None and (names := contamination.find(record)):
            ledger["contaminated"] += 1
            ledger.update(f"contaminated/{name}" for name in names)
            continue
        ledger["kept"] += 1
        yield build_row(record)


def _drop_bad(settings: FilesData, role: str, ledger: Counter[str], error: BadRecordError) -> None:
    if settings.bad_records == "error":
        cure = "Correct it, or set data.bad_records=drop to leave such records out (they are counted)"
        raise type(error)(f"data.{role}: {error}. {cure}") from error
    ledger[f"dropped_{error.reason}"] += 1


def _count_rows(rows: Iterator[tuple[str, Row]], role: str, ledger: Counter[str]) -> Iterator[tuple[str, Row]]:
    for place, row in rows:
        ledger["read"] += 1
        yield place, row
        if role == "prompts" and row.get("verifier") is None:
            ledger["verifier_chosen"] += 1


def _join(
    parts: Sequence[Path], weights: Sequence[float], settings: FilesData, file: Path, ledger: Counter[str]
) -> int:
    """Parts one after another, or with weights as a mixture; returns the number of records."""
    if not weights:
        return write_jsonl(file, (row for part in parts for row in _read_part(part)))
    opened: list[Callable[[], Iterator[Row]]] = [partial(_read_part, part) for part in parts]
    mixed = mix(opened, weights, seed=settings.seed, stop=settings.stop, ledger=ledger)
    num_records = write_jsonl(file, (row for _, row in mixed))
    ledger["mixed"] += num_records
    ledger["left_over"] += ledger["kept"] - (num_records - ledger["repeated"])
    return num_records


def _read_part(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _describe(ledger: Counter[str]) -> str:
    return ", ".join(f"{word} {count:,}" for word, count in ledger.items())
