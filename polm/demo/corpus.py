"""The demo dataset: text to pre-train and mid-train on, examples for SFT, prompts for RL, held-out benchmarks.

Every prompt belongs for ever to one of two sides: the hash of its text puts a tenth of all prompts aside.
Benchmarks are drawn from that tenth alone and training files from the rest, so nothing has to be removed
afterwards; that nothing did slip through is then checked on the files as written. The benchmarks are the same
for every seed, so that runs with different seeds are compared on the same items.

A document is prose, or a question with its solution. Three coins are tossed for a question: whether the
solution is corrupted (a slip leads to a wrong answer), whether it is direct (the answer without its steps),
and whether it is written in chat format. Each file has a random stream of its own: another number of SFT
examples leaves the pre-training text as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from polm.demo.prose import generate_prose
from polm.demo.tasks import TASKS, Item, build_direct_solution, corrupt
from polm.errors import DataError

Record = dict[str, Any]
Row = tuple[str, Record]

HELD_OUT_ONE_IN = 10
BENCHMARK_SEED = "benchmark"
VERIFIER = "exact"
USER_MARK = "<|user|>"
ASSISTANT_MARK = "<|assistant|>"
TRAINING_FILES = ("pretrain.jsonl", "midtrain.jsonl", "sft.jsonl", "prompts.jsonl")

# So many draws in a row without a new prompt mean that there is none left worth waiting for.
MAX_DRAWS = 2000


@dataclass(frozen=True)
class Mixture:
    """Shares between 0 and 1: `prose` of all documents; `direct`, `corrupted` and `chat` of the questions."""

    prose: float
    direct: float
    corrupted: float
    chat: float


def sort_words(prompt: str) -> tuple[str, ...]:
    """What a prompt and its twins have in common: the same words in another order (`a or b`, `b or a`)."""
    return tuple(sorted(prompt.split()))


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth that only benchmarks may use, with all of its reordered twins."""
    digest = hashlib.blake2b(" ".join(sort_words(prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def count_tokens(text: str) -> int:
    """Return the number of tokens of a word-level tokenizer that splits numbers into digits."""
    return sum(len(word) if word.isdigit() else 1 for word in text.split())


def build_demo_dataset(
    out: Path,
    *,
    seed: int,
    num_pretrain_docs: int,
    num_midtrain_docs: int,
    num_sft: int,
    num_prompts: int,
    num_items: int = 200,
    prose_share: float,
    direct_share: float,
    corrupted_share: float,
    chat_share: float,
    midtrain_prose_share: float,
    midtrain_corrupted_share: float,
) -> dict[str, Any]:
    """Write the dataset folder `out` and return its summary, which is also written, last, as `summary.json`.

    `prose_share` and `corrupted_share` are those of `pretrain.jsonl`, the `midtrain_` ones those of
    `midtrain.jsonl`; `direct_share` and `chat_share` hold for both. `prose_share` is a share of all documents,
    the others are shares of the questions. `num_items` counts the items of each benchmark. The same arguments
    give the same bytes. Files of the same names in `out` are replaced.

    Raises DataError for a share outside [0, 1], a count below 1, or more distinct prompts than a task has.
    """
    settings = {name: value for name, value in locals().items() if name != "out"}
    _check_settings(settings)
    ledger = Counter({"held_out_redrawn": 0, "repeats_redrawn": 0, "prompts_shared_with_sft": 0})
    benchmarks = {task: build_benchmark(task, num_items) for task in TASKS}
    pretrain = Mixture(prose_share, direct_share, corrupted_share, chat_share)
    midtrain = Mixture(midtrain_prose_share, direct_share, midtrain_corrupted_share, chat_share)
    sft_items = _draw_distinct(num_sft, Random(f"{seed}/sft"), set(), ledger)
    rl_items = _draw_distinct(num_prompts, Random(f"{seed}/prompts"), {item.prompt for item in sft_items}, ledger)

    files = {
        "pretrain.jsonl": _draw_documents(num_pretrain_docs, Random(f"{seed}/pretrain"), pretrain, ledger),
        "midtrain.jsonl": _draw_documents(num_midtrain_docs, Random(f"{seed}/midtrain"), midtrain, ledger),
        "sft.jsonl": ((item.task, _build_sft_record(item)) for item in sft_items),
        "prompts.jsonl": ((item.task, _build_prompt_record(item)) for item in rl_items),
    }
    for task, items in benchmarks.items():
        files[f"benchmarks/{task}.jsonl"] = (
            (task, _build_benchmark_record(item, index)) for index, item in enumerate(items)
        )
    counts = {name: _write_file(out / name, rows) for name, rows in files.items()}

    benchmark_prompts = {item.prompt for items in benchmarks.values() for item in items}
    _check_contamination([out / name for name in TRAINING_FILES], benchmark_prompts, ledger)
    summary = {"dataset": "demo", "settings": settings, "files": counts, "ledger": dict(ledger)}
    _write_lines(out / "summary.json", [json.dumps(summary, indent=2)])
    return summary


def build_benchmark(task: str, num_items: int) -> list[Item]:
    """Return `num_items` distinct held-out items of a task. A smaller number gives the first of a larger one.

    Raises DataError when the task has not that many held-out prompts.
    """
    rng = Random(f"{BENCHMARK_SEED}/{task}")
    items: dict[str, Item] = {}
    while len(items) < num_items:
        item = _draw(task, rng, Counter(), avoid=items.keys(), held_out=True)
        if item is None:
            raise DataError(
                f"benchmark {task!r}: {num_items} distinct held-out items are wanted, but only {len(items)} were "
                f"found before {MAX_DRAWS} draws in a row gave nothing new; set num_items to {len(items)} or less"
            )
        items[item.prompt] = item
    return list(items.values())


def find_contaminated(texts: Iterable[str], prompts: Collection[str]) -> list[int]:
    """Return the indices of the texts that contain one of `prompts`, or a reordering that begins with the same word,
    as a run of whole words, anywhere."""
    # A prompt can only begin where its first word stands, so nearly all places are passed over at once.
    lengths: dict[str, set[int]] = {}
    for prompt in prompts:
        words = prompt.split()
        lengths.setdefault(words[0], set()).add(len(words))
    wanted = {sort_words(prompt) for prompt in prompts}
    found = []
    for index, text in enumerate(texts):
        words = text.split()
        spans = (words[i : i + length] for i, word in enumerate(words) for length in lengths.get(word, ()))
        if any(tuple(sorted(span)) in wanted for span in spans):
            found.append(index)
    return found


def _check_settings(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name.startswith("num_") and value < 1:
            raise DataError(f"demo dataset: {name} is {value}; it must be at least 1")
        if name.endswith("_share") and not 0 <= value <= 1:
            raise DataError(f"demo dataset: {name} is {value}; a share lies between 0 and 1")


def _draw(task: str, rng: Random, ledger: Counter[str], *, avoid: Collection[str], held_out: bool) -> Item | None:
    """Draw an item on the wanted side of the split whose prompt is not in `avoid`; None if that seems hopeless."""
    for _ in range(MAX_DRAWS):
        item = TASKS[task].generate(rng)
        if is_held_out(item.prompt) != held_out:
            ledger["held_out_redrawn"] += 1
        elif item.prompt in avoid:
            ledger["repeats_redrawn"] += 1
        else:
            return item
    return None


def _draw_distinct(num_items: int, rng: Random, avoid: set[str], ledger: Counter[str]) -> list[Item]:
    """Draw training items with distinct prompts; those in `avoid` are used only where a task has no others left."""
    items: dict[str, Item] = {}
    taken = set(avoid)
    while len(items) < num_items:
        task = rng.choice(list(TASKS))
        item = _draw(task, rng, ledger, avoid=taken, held_out=False)
        if item is None:
            item = _draw(task, rng, ledger, avoid=items.keys(), held_out=False)
            ledger["prompts_shared_with_sft"] += 1
        if item is None:
            raise DataError(
                f"demo dataset: {num_items} distinct prompts are wanted, but the task {task!r} has no new one after "
                f"{len(items)}; lower num_sft or num_prompts"
            )
        items[item.prompt] = item
        taken.add(item.prompt)
    return list(items.values())


def _draw_documents(num_docs: int, rng: Random, mixture: Mixture, ledger: Counter[str]) -> Iterator[Row]:
    """Draw plain documents. Their source is `prose` or TASK/FORM, with FORM one of steps, direct, corrupted."""
    for _ in range(num_docs):
        if rng.random() < mixture.prose:
            yield "prose", {"text": generate_prose(rng), "source": "prose"}
            continue
        item = _draw(rng.choice(list(TASKS)), rng, ledger, avoid=(), held_out=False)
        assert item is not None, "nine of ten prompts are free, and no prompt is avoided"
        is_corrupted, is_direct, is_chat = (
            rng.random() < share for share in (mixture.corrupted, mixture.direct, mixture.chat)
        )
        solution = corrupt(item, rng) if is_corrupted else item.solution
        solution = build_direct_solution(solution) if is_direct else solution
        text = f"{item.prompt} {solution}"
        if is_chat:
            text = f"{USER_MARK} {item.prompt} {ASSISTANT_MARK} {solution}"
        source = f"{item.task}/{'corrupted' if is_corrupted else 'direct' if is_direct else 'steps'}"
        yield source, {"text": text, "source": source}


def _build_sft_record(item: Item) -> Record:
    return {
        "messages": [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.solution}],
    }


def _build_prompt_record(item: Item) -> Record:
    return {
        "prompt": item.prompt,
        "answer": item.answer,
        "verifier": VERIFIER,
        "task": item.task,
        "solution": item.solution,
    }


def _build_benchmark_record(item: Item, index: int) -> Record:
    return {
        "id": f"{item.task}-{index:04d}",
        "prompt": item.prompt,
        "answer": item.answer,
        "solution": item.solution,
        "verifier": VERIFIER,
    }


def _read_text(record: Record) -> str:
    """Return all that a model may read of a record of any training file."""
    if "text" in record:
        return str(record["text"])
    if "messages" in record:
        return " ".join(message["content"] for message in record["messages"])
    return f"{record['prompt']} {record['solution']}"


def _write_file(path: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Write the records of (source, record) rows as JSON lines; return the counts, in all and by source."""
    sources: dict[str, Counter[str]] = {}
    lines: list[str] = []
    for source, record in rows:
        lines.append(json.dumps(record))
        sources.setdefault(source, Counter()).update(num_records=1, num_tokens=count_tokens(_read_text(record)))
    _write_lines(path, lines)
    return {
        "num_records": len(lines),
        "num_tokens": sum(counts["num_tokens"] for counts in sources.values()),
        "sources": {source: dict(sources[source]) for source in sorted(sources)},
    }


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file under a temporary name first, so that a file with its final name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
    temporary.replace(path)


def _check_contamination(paths: list[Path], prompts: Collection[str], ledger: Counter[str]) -> None:
    """Search the training files, as they lie on disk, for benchmark prompts; count what was checked and found."""
    for path in paths:
        with path.open(encoding="utf-8") as file:
            texts = [_read_text(json.loads(line)) for line in file]
        found = find_contaminated(texts, prompts)
        ledger["checked_for_contamination"] += len(texts)
        ledger["contaminated"] += len(found)
        assert not found, f"{path}, line {found[0] + 1}: a benchmark prompt is in a training file"
