"""Who answers a judge's questions: one protocol for local models and servers, and a cache on disk for both.

A question is a list of messages. Either the reply is a text, or, where the question has `options`, how likely the
judge is to reply with each of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polm.data.fingerprint import fingerprint_values
from polm.engine.annotate import annotate_trees
from polm.errors import DataError, ModelError
from polm.rollout.generate import SamplingParams, generate
from polm.text.chat import find_control_tokens, render_chat, render_prompt, stop_token_ids
from polm.tokens import Array, Tree, build_completions, tree_length

ReplyStatus = Literal["answered", "timeout", "error"]
# Requests that a local model answers between two writes to the cache.
CHUNK = 64
SCORE_BIN = 4096
MAX_BREAKS = 8  # breaking one control token may leave another


@dataclass(frozen=True)
class Request:
    """One question. With `options` nothing is written: the reply has the log-probability of each option.

    `seed` tells votes on the same question apart; a greedy reply does not depend on it.
    """

    messages: tuple[Mapping[str, str], ...]
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """`text` is what was written (`cut`: up to the limit of its length), or `logprobs` has a natural logarithm for each
    option (-inf: too unlikely to be told). `note` says why there is none; it may quote a server."""

    status: ReplyStatus
    text: str = ""
    logprobs: tuple[float, ...] = ()
    note: str = ""
    cut: bool = False


Keep = Callable[[int, Reply], None]


def keep_nothing(index: int, reply: Reply) -> None:
    del index, reply


class Backend(Protocol):
    """Answers questions; a question that fails has a reply that says so. `keep` is called with each reply as soon as
    it is there, perhaps from another thread. `name` says whose replies these are: a part of the cache's keys."""

    @property
    def name(self) -> str: ...

    def ask(self, requests: Sequence[Request], keep: Keep = keep_nothing) -> list[Reply]: ...


# ---- the cache -----------------------------------------------------------------------------------------------------


def request_key(name: str, request: Request) -> str:
    """sha256 of (model, prompt, params). A greedy reply has one key whatever its seed."""
    values = asdict(request)
    if request.temperature == 0:
        del values["seed"]
    if request.options:  # nothing is written
        del values["max_new_tokens"]
    return fingerprint_values({"model": name, **values})


@dataclass(frozen=True)
class CachedBackend:
    """Replies kept in `folder`, a file each; failures are not kept. A killed run asks nothing twice."""

    inner: Backend
    folder: Path
    progress: Callable[[int, int], None] | None = None

    @property
    def name(self) -> str:
        return self.inner.name

    def ask(self, requests: Sequence[Request], keep: Keep = keep_nothing) -> list[Reply]:
        keys = [request_key(self.name, request) for request in requests]
        known: dict[str, Reply] = {}
        for key in dict.fromkeys(keys):
            reply = self._read(key)
            if reply is not None:
                known[key] = reply
        places = {key: i for i, key in reversed(list(enumerate(keys)))}
        missing = [key for key in places if key not in known]
        missing.sort(key=places.__getitem__)
        done = len(known)
        lock = threading.Lock()

        def keep_reply(index: int, reply: Reply) -> None:
            nonlocal done
            if reply.status == "answered":
                self._write(missing[index], reply)
            with lock:
                done += 1
                if self.progress is not None:
                    self.progress(done, len(places))

        if missing:
            found = self.inner.ask([requests[places[key]] for key in missing], keep_reply)
            known |= dict(zip(missing, found, strict=True))
        replies = [known[key] for key in keys]
        for index, reply in enumerate(replies):
            keep(index, reply)
        return replies

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> Reply | None:
        """None for a reply that is not there or cannot be read, which is then asked for again."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row = json.loads(self._path(key).read_text(encoding="utf-8"))
            logprobs = tuple(-math.inf if value is None else float(value) for value in row["logprobs"])
            return Reply("answered", str(row["text"]), logprobs, cut=bool(row["cut"]))
        return None

    def _write(self, key: str, reply: Reply) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        logprobs = [value if math.isfinite(value) else None for value in reply.logprobs]
        row = {"model": self.name, "text": reply.text, "logprobs": logprobs, "cut": reply.cut}
        text = json.dumps(row, allow_nan=False)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)


# ---- a local model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalBackend:
    """A model on this machine. `name` should change with its weights: it is a part of the cache's keys."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    bf16: bool = False

    @property
    def max_positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def ask(self, requests: Sequence[Request], keep: Keep = keep_nothing) -> list[Reply]:
        """Raises UserError or ModelError where the model itself cannot be asked (it has no chat template)."""
        replies: list[Reply] = []
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            answered = self._answer(chunk)
            for index, reply in enumerate(answered):
                keep(start + index, reply)
            replies += answered
        return replies

    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        out: list[Reply | None] = [None] * len(requests)
        groups: dict[tuple[int, float, tuple[str, ...]], list[int]] = {}
        prompts: list[Array] = []
        for i, request in enumerate(requests):
            try:
                prompts.append(self._encode(request))
            except DataError as error:  # a text that cannot be put into the template
                prompts.append(np.zeros(0, dtype=np.int64))
                out[i] = Reply("error", note=str(error))
                continue
            room = self.max_positions - len(prompts[i])
            if room < 1:
                words = f"the question has {len(prompts[i])} tokens, and the judge's context is {self.max_positions}"
                out[i] = Reply("error", note=words)
                continue
            groups.setdefault((request.max_new_tokens, request.temperature, request.options), []).append(i)
        for (length, temperature, options), members in groups.items():
            chosen = [(requests[i], prompts[i]) for i in members]
            found = self._compare(chosen, options) if options else self._write(chosen, length, temperature)
            for i, reply in zip(members, found, strict=True):
                out[i] = reply
        return [reply for reply in out if reply is not None]

    def _encode(self, request: Request) -> Array:
        messages = [{**m, "content": break_control_tokens(self.tokenizer, m["content"])} for m in request.messages]
        return render_prompt(self.tokenizer, messages)

    def _write(self, chosen: Sequence[tuple[Request, Array]], length: int, temperature: float) -> list[Reply]:
        params = SamplingParams(
            max_new_tokens=length, temperature=temperature, stop_token_ids=stop_token_ids(self.tokenizer)
        )
        # The draw belongs to the question and its vote, not to its place among others.
        streams = [int(fingerprint_values(asdict(request))[:12], 16) for request, _ in chosen]
        prompts = [prompt for _, prompt in chosen]
        written = generate(self.model, self.tokenizer, prompts, params, bf16=self.bf16, streams=streams)
        return [Reply("answered", completion.text, cut=completion.finish == "length") for completion in written]

    def _compare(self, chosen: Sequence[tuple[Request, Array]], options: tuple[str, ...]) -> list[Reply]:
        """One forward: a question is the root, its options are the children."""
        # What a template writes before a reply is the same for all questions, so the tokens of a reply are too.
        tokens = self._encode_options(options)
        trees: list[Tree | None] = []
        for _, prompt in chosen:
            tree = build_completions(prompt, tokens)
            longest = len(prompt) + max(len(segment) for segment in tree[1:])
            trees.append(tree if longest <= self.max_positions else None)
        fitting = [tree for tree in trees if tree is not None]
        sums = iter(_sum_children(self.model, fitting, self.bf16)) if fitting else iter(())
        words = f"the question leaves no room for a verdict in the judge's context of {self.max_positions} tokens"
        return [Reply("error", note=words) if t is None else Reply("answered", logprobs=next(sums)) for t in trees]

    def _encode_options(self, options: tuple[str, ...]) -> list[Array]:
        """The tokens of each option as the reply's beginning. Where one option begins with another (1 and 10), the
        end of the turn tells them apart and is scored too."""
        asked = [{"role": "user", "content": "?"}]
        start = len(render_prompt(self.tokenizer, asked))
        stops = set(stop_token_ids(self.tokenizer))
        replies = [[*asked, {"role": "assistant", "content": option}] for option in options]
        whole = [render_chat(self.tokenizer, messages).token_ids[start:] for messages in replies]
        bare = [np.array([t for t in ids.tolist() if t not in stops], dtype=np.int64) for ids in whole]
        if len({ids.tobytes() for ids in bare}) < len(bare):
            raise ModelError(
                f"the judge's tokenizer gives several of the verdicts {', '.join(options)} the same tokens (as unknown "
                "words?), so the judge cannot tell them apart; take another judge, or verdict: text"
            )
        is_prefix = any(
            a is not b and len(a) <= len(b) and a.tolist() == b[: len(a)].tolist() for a in bare for b in bare
        )
        return whole if is_prefix else bare


def _sum_children(model: PreTrainedModel, trees: Sequence[Tree], bf16: bool) -> list[tuple[float, ...]]:
    """Log-probability of each child of each tree, given the root; natural logarithms."""
    was_training = model.training
    flat = annotate_trees(model, trees, bin_tokens=SCORE_BIN, bf16=bf16).logprobs.astype(np.float64)
    model.train(was_training)
    out, offset = [], 0
    for tree in trees:
        place = offset + len(tree[0])
        sums = []
        for segment in tree[1:]:
            sums.append(float(flat[place : place + len(segment)].sum()))
            place += len(segment)
        out.append(tuple(sums))
        offset += tree_length(tree)
    return out


def break_control_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """`text` with a space inside each control token and role marker of the chat template, so that it stays text."""
    found = find_control_tokens(tokenizer, text)
    for _ in range(MAX_BREAKS):
        if not found:
            return text
        for marker in found:
            text = text.replace(marker, f"{marker[:1]} {marker[1:]}")
        found = find_control_tokens(tokenizer, text)
    if found:  # a marker of one character, or one that the text spells in another way
        raise DataError(f"the text holds {found[0]!r}, which the judge's tokenizer reads as a control token")
    return text
