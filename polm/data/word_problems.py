"""Builds a dataset folder from published arithmetic word problems: training text, SFT examples, prompts, benchmarks.

The model sees a question with masked numbers and writes an expression over them (`#### N0 - N1`), which the verifier
"expression" evaluates; it has to understand the question and needs no arithmetic. How a question is written is
described in `word_problem_text`, where the problems come from in `word_problem_sources`.

The split. Questions that are nearly the same form a family: equal after masking numbers, names and things, or a
Jaccard similarity of their word sets above 0.8, or 13 words in a row in common. A hash of the family's first question
puts the whole family on one side, for every seed the same. GSM8K keeps its published test part; training questions
that are nearly the same as one of those are dropped.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from polm.data.benchmarks import format_number
from polm.data.readers import write_jsonl
from polm.data.word_problem_sources import Ledger, Problem, is_close, read_problems
from polm.data.word_problem_text import (
    CommonWords,
    collect_common_words,
    mask_question,
    normalise_question,
    render_problem,
    renumber,
)
from polm.errors import DataError
from polm.text.arithmetic import ArithmeticSyntaxError, Node, evaluate

Record = dict[str, Any]
Row = tuple[str, Record]

VERIFIER = "expression"
SIMILARITY = 0.8
NGRAM = 13
ONE_STEP_SOURCES = ("mawps", "asdiv", "svamp")
BENCHMARKS = (*ONE_STEP_SOURCES, "two_step", "gsm8k")


@dataclass(frozen=True)
class Split:
    """The four sides; a family of nearly equal questions lies in one of them.

    `supervised` problems are shown with solutions; of `prompts` the questions alone are shown.
    """

    supervised: list[Problem]
    prompts: list[Problem]
    held_out: list[Problem]


def build_word_problems_dataset(
    data: Path,
    out: Path,
    *,
    seed: int,
    holdout_share: float = 0.2,
    num_items: int | None = None,
    prompt_share: float = 0.2,
    num_variants: int = 3,
    chat_share: float = 0.1,
    max_gsm8k_operators: int = 3,
) -> dict[str, Any]:
    """Writes the dataset folder `out` from the files below `data`; returns its summary, also in `summary.json`.

    Args:
        seed: of the renumbered variants, the chat coin and the order of documents; the split does not depend on it.
        holdout_share: share of the families of asdiv, svamp and mawps that benchmarks are made of.
        num_items: the most items of each benchmark; None for all.
        prompt_share: share of the other families whose solutions appear nowhere: prompts for RL and preferences.
        num_variants: renumbered copies of each asdiv, svamp and mawps problem in `pretrain.jsonl` beside itself.
        chat_share: share of the question documents that are written in chat format.
        max_gsm8k_operators: GSM8K problems with longer solutions are left out of training.

    Raises:
        DataError: a missing or damaged file, or a share or count out of its range.
    """
    settings = {name: value for name, value in locals().items() if name not in ("data", "out")}
    _check_settings(settings)
    problems, ledger = read_problems(data)
    common_words = collect_common_words(problem.masked for problem in problems)
    problems = _drop_repeats(problems, ledger)
    split = split_problems(problems, common_words, holdout_share, prompt_share, ledger)
    split = _resolve_ambiguous(split, ledger)
    split = replace(split, supervised=_limit_gsm8k(split.supervised, max_gsm8k_operators, ledger))
    split = replace(split, prompts=_limit_gsm8k(split.prompts, max_gsm8k_operators, ledger))
    writer = _Writer(common_words, seed, chat_share)
    files: dict[str, Iterable[Row]] = {
        "pretrain.jsonl": writer.draw_documents("pretrain", split.supervised, num_variants, split.prompts),
        "midtrain.jsonl": writer.draw_documents("midtrain", split.supervised, 1, []),
        "sft.jsonl": writer.draw_conversations(split.supervised),
        "prompts.jsonl": writer.draw_prompts(split.prompts, num_variants),
    }
    benchmarks = {name: writer.build_benchmark(name, split.held_out, num_items) for name in BENCHMARKS}
    files |= {f"benchmarks/{name}.jsonl": rows for name, rows in benchmarks.items() if rows}
    written = {name: _write(out / name, rows) for name, rows in files.items()}
    used = sum(len(rows) for rows in benchmarks.values())
    ledger["held out, in no benchmark"] = len(split.held_out) - used
    summary = {
        "dataset": "word_problems",
        "settings": settings,
        "files": written,
        "majority": _score_majority(split.supervised, common_words, benchmarks),
        "ledger": dict(sorted(ledger.items())),
    }
    write_jsonl(out / "summary.json", [summary])
    return summary


def split_problems(
    problems: Sequence[Problem],
    common_words: CommonWords,
    holdout_share: float,
    prompt_share: float,
    ledger: Ledger,
) -> Split:
    """Splits by families and drops the training questions that are nearly the same as a held-out one (GSM8K test)."""
    pairs = find_similar_pairs(
        [normalise_question(problem) for problem in problems],
        [mask_question(problem, common_words) for problem in problems],
    )
    families = group_families(len(problems), pairs)
    held: set[int] = set()
    for family in families:
        members = [problems[index] for index in family]
        # GSM8K has a published test part: families of its training questions alone have nothing to be held out for.
        is_cut = any(problem.source != "gsm8k" for problem in members)
        is_held = is_cut and hash_share(min(normalise_question(problem) for problem in members)) < holdout_share
        held.update(index for index in family if is_held or problems[index].part == "test")
    contaminated = {index for pair in pairs if len(held.intersection(pair)) == 1 for index in pair} - held
    ledger["families"] = len(families)
    ledger["training/dropped: nearly the same as a held-out question"] = len(contaminated)
    supervised: list[Problem] = []
    prompts: list[Problem] = []
    for family in families:
        kept = [problems[index] for index in family if index not in held and index not in contaminated]
        first = min((normalise_question(problem) for problem in kept), default="")
        side = prompts if hash_share(f"prompt {first}") < prompt_share else supervised
        side += kept
    return Split(supervised, prompts, [problems[index] for index in sorted(held)])


def find_similar_pairs(questions: Sequence[str], masked: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of questions that count as nearly the same (see the top of this file); enough of them to link families.

    `questions` are normalised, `masked` are the same with names and things masked as well.
    """
    words = [question.split() for question in questions]
    pairs = [*_find_overlapping(words)]
    first_seen: dict[object, int] = {}
    for index, (question, sequence) in enumerate(zip(masked, words, strict=True)):
        keys: list[object] = [question]
        keys += [tuple(sequence[begin : begin + NGRAM]) for begin in range(len(sequence) - NGRAM + 1)]
        for key in keys:
            other = first_seen.setdefault(key, index)
            if other != index:
                pairs.append((other, index))
    return pairs


def group_families(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected groups of 0 ... count-1 under the pairs, each sorted, in the order of their first members."""
    parents = list(range(count))

    def find(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for first, second in pairs:
        parents[find(first)] = find(second)
    families: dict[int, list[int]] = defaultdict(list)
    for index in range(count):
        families[find(index)].append(index)
    return list(families.values())


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone (blake2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def learn_operator_cues(problems: Iterable[Problem]) -> Callable[[Problem, Node], float]:
    """Naive Bayes over the words of unambiguous one-operator problems: a score of an equation for a question."""
    counts: dict[str, Counter[str]] = {symbol: Counter() for symbol in "+-*/"}
    totals: Counter[str] = Counter()
    for problem in problems:
        if len(problem.equations) == 1 and problem.num_operators == 1:
            (symbol,) = _list_operators(problem.equation)
            totals[symbol] += 1
            counts[symbol].update(set(normalise_question(problem).split()))

    def score(problem: Problem, equation: Node) -> float:
        words = set(normalise_question(problem).split())
        return sum(
            math.log((totals[symbol] + 1) / (totals.total() + 4))
            + sum(math.log((counts[symbol][word] + 1) / (totals[symbol] + 2)) for word in words)
            for symbol in _list_operators(equation)
        )

    return score


def _list_operators(tree: Node) -> list[str]:
    if not isinstance(tree, tuple):
        return []
    return [tree[0], *_list_operators(tree[1]), *_list_operators(tree[2])]


def _find_overlapping(words: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    """Pairs whose word sets have a Jaccard similarity above SIMILARITY.

    Such a pair shares at least one of each one's rarest words, (1 - SIMILARITY) of them and one more; only questions
    that do are compared.
    """
    sets = [frozenset(sequence) for sequence in words]
    frequency = Counter(word for members in sets for word in members)
    holders: dict[str, list[int]] = defaultdict(list)
    for index, members in enumerate(sets):
        rarest = sorted(members, key=lambda word: (frequency[word], word))
        prefix = rarest[: len(rarest) - math.ceil(SIMILARITY * len(rarest)) + 1]
        for other in sorted({other for word in prefix for other in holders[word]}):
            shared = len(members & sets[other])
            if shared > SIMILARITY * (len(members) + len(sets[other]) - shared):
                yield other, index
        for word in prefix:
            holders[word].append(index)


def _drop_repeats(problems: Iterable[Problem], ledger: Ledger) -> list[Problem]:
    """Keeps the first of the problems that are equal up to their numbers; one of GSM8K's test part before others."""
    kept: dict[str, Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.part != "test"):
        if kept.setdefault(normalise_question(problem), problem) is not problem:
            ledger[f"{problem.source}/dropped: a repeated question"] += 1
    return list(kept.values())


def _resolve_ambiguous(split: Split, ledger: Ledger) -> Split:
    """Puts the likeliest equation of each ambiguous problem first; the cues come from supervised problems alone."""
    score = learn_operator_cues(split.supervised)

    def resolve(problem: Problem) -> Problem:
        if len(problem.equations) == 1:
            return problem
        best = max(problem.equations, key=lambda equation: score(problem, equation))
        ledger["ambiguous equations/decided by cues"] += 1
        ledger["ambiguous equations/not the simplest"] += best != problem.equation
        return replace(problem, equations=(best,))

    return Split(
        *([resolve(problem) for problem in side] for side in (split.supervised, split.prompts, split.held_out))
    )


def _limit_gsm8k(problems: Iterable[Problem], max_operators: int, ledger: Ledger) -> list[Problem]:
    kept = []
    for problem in problems:
        if problem.source == "gsm8k" and problem.num_operators > max_operators:
            ledger[f"gsm8k/dropped: more than {max_operators} operators (max_gsm8k_operators)"] += 1
        else:
            kept.append(problem)
    return kept


@dataclass(frozen=True)
class _Writer:
    """Turns problems into rows; each file has a random stream of its own."""

    common_words: CommonWords
    seed: int
    chat_share: float

    def draw_documents(
        self, name: str, problems: Sequence[Problem], num_variants: int, unsolved: Sequence[Problem]
    ) -> list[Row]:
        """Shuffled documents: each problem and its variants with solutions, and `unsolved` questions alone."""
        rng = Random(f"{self.seed}/{name}")
        rows: list[Row] = []
        for problem in self._vary(problems, num_variants, rng):
            rendered = render_problem(problem, self.common_words)
            in_chat = rng.random() < self.chat_share
            form = "<|user|> {} <|assistant|> {}" if in_chat else "{} {}"
            source = f"{problem.source}{'/chat' if in_chat else ''}"
            rows.append((source, {"text": form.format(rendered.prompt, rendered.solution), "source": source}))
        for problem in unsolved:
            source = f"{problem.source}/question only"
            rows.append((source, {"text": render_problem(problem, self.common_words).prompt, "source": source}))
        rng.shuffle(rows)
        return rows

    def draw_conversations(self, problems: Sequence[Problem]) -> list[Row]:
        rng = Random(f"{self.seed}/sft")
        rows: list[Row] = []
        for problem in self._vary(problems, 1, rng):
            rendered = render_problem(problem, self.common_words)
            messages = [
                {"role": "user", "content": rendered.prompt},
                {"role": "assistant", "content": rendered.solution},
            ]
            rows.append((problem.source, {"messages": messages}))
        rng.shuffle(rows)
        return rows

    def draw_prompts(self, problems: Sequence[Problem], num_variants: int) -> list[Row]:
        rng = Random(f"{self.seed}/prompts")
        rows = [
            (problem.source, self._build_item(problem) | {"task": problem.source})
            for problem in self._vary(problems, num_variants, rng)
        ]
        rng.shuffle(rows)
        return rows

    def build_benchmark(self, name: str, held_out: Iterable[Problem], num_items: int | None) -> list[Row]:
        """The first `num_items` held-out problems of a benchmark in the order of a hash, so that fewer are a part."""
        problems = [problem for problem in held_out if _name_benchmark(problem) == name]
        problems.sort(key=lambda problem: hash_share(f"order {problem.id}"))
        return [(p.source, {"id": p.id, **self._build_item(p)}) for p in problems[:num_items]]

    def _build_item(self, problem: Problem) -> Record:
        rendered = render_problem(problem, self.common_words)
        return {
            "prompt": rendered.prompt,
            "answer": format_number(problem.answer),
            "solution": rendered.solution,
            "verifier": VERIFIER,
            "numbers": list(rendered.numbers),
        }

    def _vary(self, problems: Iterable[Problem], num_variants: int, rng: Random) -> Iterator[Problem]:
        """Each problem and up to `num_variants` renumbered copies that read differently; GSM8K without copies."""
        for problem in problems:
            yield problem
            seen = {render_problem(problem, self.common_words).prompt}
            for _ in range(num_variants if problem.source != "gsm8k" else 0):
                variant = renumber(problem, rng)
                if variant is None:
                    break
                prompt = render_problem(variant, self.common_words).prompt
                if prompt not in seen:
                    seen.add(prompt)
                    yield variant


def _name_benchmark(problem: Problem) -> str | None:
    if problem.source == "gsm8k":
        return "gsm8k" if problem.part == "test" else None
    return {1: problem.source, 2: "two_step"}.get(problem.num_operators)


def _score_majority(
    problems: Iterable[Problem], common_words: CommonWords, benchmarks: Mapping[str, Sequence[Row]]
) -> dict[str, float]:
    """Share of right answers of the most frequent training expression, in percent: what guessing achieves."""
    counts = Counter(render_problem(p, common_words).solution for p in problems if p.source != "gsm8k")
    if not counts:
        return {}
    expression = counts.most_common(1)[0][0].removeprefix("#### ")
    scores = {}
    for name, rows in benchmarks.items():
        right = [_is_right(expression, record) for _, record in rows]
        scores[name] = round(100 * sum(right) / len(right), 2) if right else 0.0
    return scores


def _is_right(expression: str, record: Record) -> bool:
    try:
        value = evaluate(expression, record["numbers"])
    except ArithmeticSyntaxError:
        return False
    return is_close(value, float(record["answer"]))


def _write(path: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Writes one file; returns its rows, its rows per source, and its words (tokens of a word-level tokenizer)."""
    rows = list(rows)
    write_jsonl(path, (record for _, record in rows))
    num_words = sum(len(text.split()) for _, record in rows for text in _list_texts(record))
    return {
        "num_records": len(rows),
        "num_tokens": num_words,
        "sources": dict(sorted(Counter(source for source, _ in rows).items())),
    }


def _list_texts(record: Record) -> list[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    return [record[column] for column in ("text", "prompt", "solution") if column in record]


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name in ("holdout_share", "prompt_share", "chat_share"):
        if not 0 <= settings[name] <= 1:
            raise DataError(f"{name} is a share between 0 and 1, found {settings[name]}")
    if settings["holdout_share"] == 1 or settings["prompt_share"] == 1:
        raise DataError("holdout_share and prompt_share must be below 1, or nothing is left to learn from")
    for name, least in (("num_items", 1), ("num_variants", 0), ("max_gsm8k_operators", 0)):
        if settings[name] is not None and settings[name] < least:
            raise DataError(f"{name} must be at least {least}, found {settings[name]}")
