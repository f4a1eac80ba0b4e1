"""A user's Python function as the reward, in a process of its own (`function_worker`).

The function is called as TRL calls its reward functions, with whole lists:

    def reward(prompts, completions, **columns) -> list[float]

`prompts` and `completions` are texts; the columns are those of prompts.jsonl beside `prompt`, and `completion_ids`,
lists of token ids. A function that takes no `**columns` is given those that it names. It runs as the user who started
polm, with all rights: it is the user's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from polm.errors import UserError
from polm.rewards.base import Reward, Rewarder, RewardItem, Tally
from polm.rewards.child import Child, ChildEndedError

MODULE = "polm.rewards.function_worker"


def build_function_rewarder(
    place: str, *, seconds: float, batch_seconds: float, tally: Tally | None = None
) -> Rewarder:
    """The rewarder of `place`, FILE.py:NAME; the child is started here, so that mistakes show before training.

    seconds        limit for one answer, when it is judged on its own
    batch_seconds  limit for a whole call; a call that fails, or takes longer, is repeated one answer at a time
    tally          takes up those calls: `calls_error` and `calls_timeout`, each with its reason

    Statuses: `scored`; `unparsed` (no value) where the function returns None; `error` where it raises, or returns what
    is no finite number or not one number an answer; `timeout`. Raises UserError for a file or function that is not
    there.
    """
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"reward_function={place}: there is no file {path}; expected FILE.py:NAME")
    child = Child(MODULE, f"the reward function {place}", "Correct the file.", (str(path.resolve()), name))
    child.start()
    return partial(
        judge, child, seconds=seconds, batch_seconds=batch_seconds, tally=Tally() if tally is None else tally
    )


def judge(
    child: Child, items: Sequence[RewardItem], *, seconds: float, batch_seconds: float, tally: Tally
) -> list[Reward]:
    """The rewards of `items` by the child's function; one bad answer does not touch the others."""
    if not items:
        return []
    whole = _ask(child, items, batch_seconds)
    if isinstance(whole, list):
        return whole
    if len(items) == 1 and batch_seconds <= seconds:
        return [whole]
    tally.add(f"calls_{whole.status}")
    words = f"a call for {len(items)} answers failed, and each was judged on its own: {whole.note}"
    tally.problems.append((whole.status, words))
    out = []
    for item in items:
        alone = _ask(child, [item], seconds)
        out += alone if isinstance(alone, list) else [alone]
    return out


def _ask(child: Child, items: Sequence[RewardItem], seconds: float) -> list[Reward] | Reward:
    """A reward an item, or the one that says why there are none."""
    names = {name: None for item in items for name in item.fields if name != "prompt"}  # in order, each once
    request = {
        "prompts": [
            item.fields["prompt"] if "prompt" in item.fields else item.messages[-1]["content"] for item in items
        ],
        "completions": [item.completion for item in items],
        "columns": {
            **{name: [item.fields.get(name) for item in items] for name in names},
            "completion_ids": [item.completion_tokens.tolist() for item in items],
        },
    }
    try:
        reply = child.ask(request, seconds)
    except TimeoutError:
        return Reward(None, "timeout", f"the reward function took longer than {seconds:g} s")
    except ChildEndedError:
        return Reward(None, "error", "the reward function's process ended (a crash, or out of memory)")
    if "error" in reply:
        return Reward(None, "error", reply["error"])
    return [_read_reward(value) for value in reply["rewards"]]


def _read_reward(value: float | str | None) -> Reward:
    if value is None:
        return Reward(None, "unparsed", "the reward function returned None")
    return Reward(None, "error", value) if isinstance(value, str) else Reward(value, "scored")
