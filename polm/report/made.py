"""What the stages of alignment leave for people to look at, as frozen records: judged answers and which of them were
kept, held-out accuracy, verdicts, revisions, and the answers that nobody could judge.

Only the first groups of a file are read: a page shows some of them, and the counts of all stand in the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from polm.report.read import read_first_lines, read_json, read_jsonl

MAX_READ = 40  # groups, verdicts, transcripts of one stage
ROLLOUT_STAGES = ("grpo", "rloo", "reinforce_pp", "remax", "ppo", "online")


@dataclass(frozen=True)
class DrawnAnswer:
    """A sampled answer with what it earned; `reward` is None where it could not be judged."""

    text: str
    status: str
    cut_off: bool = False
    reward: float | None = None
    note: str = ""


@dataclass(frozen=True)
class AnswerGroup:
    """One line of answers.jsonl (`pairs`, `rejection`). `roles` is filled in from what the stage made of the group:
    "kept", "chosen", "rejected", or "" for an answer that went nowhere."""

    prompt: str
    answers: list[DrawnAnswer]
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability table: how sure the model was on average, and how often it was right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    pairs: int = 0
    steps: int = 0

    @property
    def count(self) -> int:
        return self.pairs or self.steps


@dataclass(frozen=True)
class Holdout:
    """holdout.json of a reward model or of a process reward model, whose names differ in part."""

    accuracy: float
    accuracy_low95: float
    accuracy_high95: float
    brier: float
    calibration_error: float
    pairs: int = 0
    steps: int = 0
    answers: int = 0
    length_accuracy: float | None = None
    length_direction: int = 0
    length_correlation: float | None = None
    majority_accuracy: float | None = None
    first_error_accuracy: float | None = None
    first_error_f1: float | None = None
    mean_margin: float | None = None
    reliability: list[Bin] = field(default_factory=list)


@dataclass(frozen=True)
class JudgedPair:
    """One line of verdicts.jsonl: a pair with the judge's preference for answer_a, or one answer with its grade."""

    prompt: list[dict[str, Any]]
    status: str
    answer_a: str = ""
    answer_b: str = ""
    answer: str = ""
    preference: float | None = None
    grade: float | None = None
    first: list[float | None] = field(default_factory=list)
    note: str = ""
    said: list[str] | str = ""
    principle: str = ""

    @property
    def replies(self) -> list[str]:
        return [self.said] if isinstance(self.said, str) else self.said


@dataclass(frozen=True)
class Round:
    """A critique and a revision by one principle, each with how it ended."""

    principle: str
    critique: str = ""
    critique_outcome: str = ""
    revision: str = ""
    revision_outcome: str = ""
    note: str = ""


@dataclass(frozen=True)
class Transcript:
    """One line of transcript.jsonl: an answer before and after its rounds of revision."""

    prompt: list[dict[str, Any]]
    answer: str
    rounds: list[Round]
    final: str


@dataclass(frozen=True)
class Problem:
    """One line of problems.jsonl: an answer that could not be judged, and why; without prompt and text what
    failed beside single answers. `update` is RL's."""

    status: str
    prompt: str
    text: str
    note: str = ""
    update: int | None = None


@dataclass(frozen=True)
class Made:
    """What one stage left; empty where it is not that stage's business."""

    answers: tuple[AnswerGroup, ...] = ()
    holdout: Holdout | None = None
    verdicts: tuple[JudgedPair, ...] = ()
    transcripts: tuple[Transcript, ...] = ()
    problems: tuple[Problem, ...] = ()


NOTHING_MADE = Made()

_ANSWERS: TypeAdapter[AnswerGroup] = TypeAdapter(AnswerGroup)
_HOLDOUT: TypeAdapter[Holdout] = TypeAdapter(Holdout)
_VERDICT: TypeAdapter[JudgedPair] = TypeAdapter(JudgedPair)
_TRANSCRIPT: TypeAdapter[Transcript] = TypeAdapter(Transcript)
_PROBLEM: TypeAdapter[Problem] = TypeAdapter(Problem)
_ROW: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def load_made(folder: Path, stage: str) -> Made:
    """What a finished stage left in its folder; files that it does not have are no mistake."""
    if stage in ("pairs", "rejection") and (folder / "answers.jsonl").is_file():
        return Made(answers=load_answers(folder), problems=load_problems(folder))
    if stage in ("reward_model", "process_reward_model") and (folder / "holdout.json").is_file():
        return Made(holdout=read_json(_HOLDOUT, folder / "holdout.json"))
    if stage == "judge" and (folder / "verdicts.jsonl").is_file():
        return Made(verdicts=read_first_lines(_VERDICT, folder / "verdicts.jsonl", MAX_READ))
    if stage == "constitution" and (folder / "transcript.jsonl").is_file():
        return Made(transcripts=read_first_lines(_TRANSCRIPT, folder / "transcript.jsonl", MAX_READ))
    if stage in ROLLOUT_STAGES:
        return Made(problems=load_problems(folder))
    return NOTHING_MADE


def load_problems(folder: Path) -> tuple[Problem, ...]:
    """The first lines of problems.jsonl; none where nothing failed."""
    file = folder / "problems.jsonl"
    return read_first_lines(_PROBLEM, file, MAX_READ) if file.is_file() else ()


def load_answers(folder: Path) -> tuple[AnswerGroup, ...]:
    """The first groups of answers.jsonl, each answer with what became of it in preferences.jsonl or sft.jsonl."""
    groups = read_first_lines(_ANSWERS, folder / "answers.jsonl", MAX_READ)
    wanted = {group.prompt for group in groups}
    uses: dict[str, list[tuple[str, str]]] = {}
    for name in ("preferences.jsonl", "sft.jsonl"):
        if (folder / name).is_file():
            for row in read_jsonl(_ROW, folder / name, finished=True):
                prompt, used = _list_used(row)
                if prompt in wanted:
                    uses.setdefault(prompt, []).extend(used)
    return tuple(AnswerGroup(g.prompt, g.answers, assign_roles(g.answers, uses.get(g.prompt, []))) for g in groups)


def _list_used(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The prompt of a row that the stage wrote, and its answers with their roles."""
    if "messages" in row:
        question, answer = row["messages"][-2:]
        return str(question["content"]), [(str(answer["content"]), "kept")]
    return str(row["prompt"]), [(str(row[role]), role) for role in ("chosen", "rejected")]


def assign_roles(answers: Sequence[DrawnAnswer], used: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The role of each answer. Of equal texts the first that could be used was: the others were dropped."""
    first: dict[str, int] = {}
    usable = [i for i, answer in enumerate(answers) if answer.reward is not None and not answer.cut_off]
    for index in (*usable, *range(len(answers))):
        first.setdefault(answers[index].text, index)
    roles = [""] * len(answers)
    for text, role in used:
        if text in first:
            roles[first[text]] = role
    return tuple(roles)
