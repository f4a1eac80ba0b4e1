"""`polm constitution`: answers criticised and revised by written principles, as SFT data.

The supervised part of Constitutional AI (Bai et al. 2022, arXiv 2212.08073): the base answers, then a critic (the base
itself, another model or a server) is asked in the same conversation for a critique by a principle, and for a revision.
The other part, preferences by the principles, is `polm judge principles=true`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polm.data.packing import epoch_order, mix_seed
from polm.data.readers import Message, read_back, read_prompt_messages, write_jsonl
from polm.errors import DataError, RecipeError, UserError
from polm.recipe_judge import BESIDE, ConstitutionStage
from polm.rewards.backends import Backend, Reply, Request
from polm.rewards.constitution import Constitution, Principle, load_constitution
from polm.rewards.judge_prompts import fill
from polm.rewards.open_backend import open_backend
from polm.stages.answers import answer_messages
from polm.stages.common import Base, Context, Stage, StageResult, input_file, load_base, new_ledger, start_stage
from polm.text.chat import find_control_tokens

CONSTITUTION = 3  # which stage draws, where stages share a seed and a file of prompts


@dataclass
class Draft:
    """An answer on its way. `rounds` is what the transcript shows; `revisions` are the accepted ones."""

    index: int
    prompt: list[Message]
    first: str
    answer: str
    rounds: list[dict[str, str]] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    was_revised: bool = False  # a revision came, be it the same text


def run(settings: ConstitutionStage, context: Context) -> StageResult:
    """Write sft.jsonl (the revised answers) and transcript.jsonl (every critique and revision)."""
    start_stage(settings, context)
    if settings.endpoint is not None and "critic" in context.inputs:
        raise RecipeError(f"give critic={context.inputs['critic']} or endpoint, not both")
    constitution = load_constitution(context.inputs.get("constitution"))
    ledger = new_ledger()
    base = load_base(context.inputs["base"])
    drafts = _read_or_answer(settings, context, base, ledger)
    source = None if settings.endpoint is not None else context.inputs.get("critic", context.inputs["base"])
    critic = open_backend(
        settings.endpoint,
        source,
        role="critic",
        precision=settings.precision,
        replies=settings.replies or context.workdir.parent / BESIDE,
        progress=lambda done, total: context.report({"update": done, "num_updates": total, "what": "critic"}),
        loaded=(base.model, base.tokenizer) if source == context.inputs["base"] else None,
    )
    for number in range(settings.rounds):
        principles = [constitution.draw(mix_seed(settings.seed, CONSTITUTION), d.index, number) for d in drafts]
        revise_round(settings, critic, base, drafts, principles, ledger)
    _require_replies(settings, ledger)
    rows = _build_rows(settings, drafts, ledger)
    write_jsonl(context.workdir / "transcript.jsonl", map(_transcript, drafts))
    if not rows:
        counts = ", ".join(f"{name} {number}" for name, number in ledger.items() if number)
        raise DataError(f"constitution: no answer was revised ({counts}); look at transcript.jsonl, try another critic")
    write_jsonl(context.workdir / "sft.jsonl", rows)
    changed = sum(bool(draft.revisions) for draft in drafts)
    summary = {
        "conversations": len(rows),
        "revised_share": changed / len(drafts),
        "constitution": constitution.name,
        **_count_principles(constitution, drafts),
    }
    return StageResult(summary, ledger)


def _read_or_answer(settings: ConstitutionStage, context: Context, base: Base, ledger: Counter[str]) -> list[Draft]:
    """The first answers, from answers.jsonl where a killed run left them."""
    prompts = read_prompt_messages(input_file(context, "data", "prompts.jsonl"))
    order = epoch_order(len(prompts), mix_seed(settings.seed, CONSTITUTION), 0)[: settings.num_prompts or len(prompts)]
    chosen = [prompts[int(i)] for i in order]
    file = context.workdir / "answers.jsonl"
    if not file.is_file():
        write_jsonl(file, _answer(settings, context, base, chosen))
    rows = list(read_back(file, ("prompt", "answer")))
    drafts = [Draft(i, r["prompt"], r["answer"], r["answer"]) for i, r in enumerate(rows) if r["answer"].strip()]
    ledger["prompts"], ledger["prompts_too_long"] = len(chosen), len(chosen) - len(rows)
    ledger["answers_empty"] = len(rows) - len(drafts)
    if not drafts:
        raise DataError(f"constitution: all {len(rows)} answers of {base.name} are empty; take a model that answers")
    return drafts


def _answer(
    settings: ConstitutionStage, context: Context, base: Base, prompts: Sequence[list[Message]]
) -> list[dict[str, Any]]:
    seed = mix_seed(settings.seed, CONSTITUTION)
    answered = answer_messages(settings, context, base, prompts, samples=1, seed=seed, what="answer")
    return [{"prompt": messages, "answer": answer} for messages, (answer,) in answered]


def revise_round(
    settings: ConstitutionStage,
    critic: Backend,
    base: Base,
    drafts: Sequence[Draft],
    principles: Sequence[Principle],
    ledger: Counter[str],
) -> None:
    """One critique and one revision of each draft, in place. What fails leaves the answer as it was, and is counted."""
    talks = [[*draft.prompt, {"role": "assistant", "content": draft.answer}] for draft in drafts]
    for draft, principle in zip(drafts, principles, strict=True):
        draft.rounds.append({"principle": principle.name})
    active = list(range(len(drafts)))
    if settings.critique:
        asked = [fill(settings.critique_prompt, {"request": principles[i].critique}) for i in active]
        requests = [build_request(settings, talks[i], ask, drafts[i]) for i, ask in zip(active, asked, strict=True)]
        going = []
        for i, ask, reply in zip(active, asked, critic.ask(requests), strict=True):
            outcome = judge_critique(reply)
            ledger[f"critiques_{outcome}"] += 1
            drafts[i].rounds[-1] |= {"critique": reply.text.strip(), "critique_outcome": outcome} | _note(reply)
            if outcome == "written":
                said = {"role": "assistant", "content": reply.text.strip()}
                talks[i] = [*talks[i], {"role": "user", "content": ask}, said]
                going.append(i)
        active = going
    asked = [fill(settings.revision_prompt, {"request": principles[i].revision}) for i in active]
    requests = [
        build_request(settings, talks[i], ask, drafts[i], revision=True) for i, ask in zip(active, asked, strict=True)
    ]
    for i, reply in zip(active, critic.ask(requests), strict=True):
        draft, text = drafts[i], reply.text.strip()
        outcome = judge_revision(reply, draft.answer, base)
        ledger[f"revisions_{outcome}"] += 1
        draft.rounds[-1] |= {"revision": text, "revision_outcome": outcome} | _note(reply)
        draft.was_revised |= outcome in ("accepted", "unchanged")
        if outcome == "accepted":
            draft.answer = text
            draft.revisions.append(text)


def build_request(
    settings: ConstitutionStage, talk: Sequence[Message], ask: str, draft: Draft, *, revision: bool = False
) -> Request:
    """The conversation so far with what is asked of the critic now."""
    return Request(
        messages=(*({"role": m["role"], "content": m["content"]} for m in talk), {"role": "user", "content": ask}),
        max_new_tokens=settings.max_new_tokens if revision else settings.max_critique_tokens,
        temperature=settings.critic_temperature,
        seed=mix_seed(settings.seed, draft.index, len(draft.rounds)) % 2**31,  # servers take 32 bits
    )


def judge_critique(reply: Reply) -> str:
    """`written`, `empty`, or how it failed. A critique that was cut off is still one."""
    if reply.status != "answered":
        return reply.status
    return "written" if reply.text.strip() else "empty"


def judge_revision(reply: Reply, before: str, base: Base) -> str:
    """`accepted`, or why not: it failed, is empty, was cut off at its length, says the same (white space aside), or
    holds control tokens of the base, which no answer can be trained on with."""
    if reply.status != "answered":
        return reply.status
    text = reply.text.strip()
    if not text:
        return "empty"
    if reply.cut:
        return "over_length"
    if find_control_tokens(base.tokenizer, text, role="assistant"):
        return "control_tokens"
    return "unchanged" if text.split() == before.split() else "accepted"


def _note(reply: Reply) -> dict[str, str]:
    return {"note": reply.note} if reply.note else {}


def _require_replies(settings: ConstitutionStage, ledger: Counter[str]) -> None:
    asked = sum(number for name, number in ledger.items() if name.startswith(("critiques_", "revisions_")))
    failed = sum(ledger[f"{what}_{status}"] for what in ("critiques", "revisions") for status in ("timeout", "error"))
    if failed > settings.max_failed * asked:
        raise UserError(
            f"constitution: {failed} of {asked} requests have no reply; max_failed is {settings.max_failed:g}. Cure "
            "that (the endpoint, a longer context) and run the same command again: replies that came are kept"
        )


def _build_rows(settings: ConstitutionStage, drafts: Sequence[Draft], ledger: Counter[str]) -> list[dict[str, Any]]:
    """Conversations that end with the last revision (or with each). An answer that nobody revised is left out."""
    rows = []
    for draft in drafts:
        if not draft.was_revised:
            ledger["prompts_without_revision"] += 1
            continue
        texts = draft.revisions if settings.keep == "all" and draft.revisions else [draft.answer.strip()]
        rows += [{"messages": [*draft.prompt, {"role": "assistant", "content": text}]} for text in texts]
    return rows


def _transcript(draft: Draft) -> dict[str, Any]:
    return {"prompt": draft.prompt, "answer": draft.first, "rounds": draft.rounds, "final": draft.answer}


def _count_principles(constitution: Constitution, drafts: Sequence[Draft]) -> dict[str, int]:
    drawn = Counter(entry["principle"] for draft in drafts for entry in draft.rounds)
    return {f"principle/{principle.name}": drawn[principle.name] for principle in constitution.principles}


STAGE = Stage(
    "constitution",
    "produce",
    ConstitutionStage,
    run,
    inputs=("base", "data"),
    optional_inputs=("critic", "constitution"),
    version=2,
    summary="answers criticised and revised by written principles (Constitutional AI)",
)
