"""An OpenAI-compatible server as a backend: `POST …/chat/completions` over the standard library.

Failures that may pass (busy, restarting, a cut reply) are tried again after a growing, random wait, never before the
time that the server asks for (Retry-After). What the key is stands in no file, no error and no note.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from polm.errors import RecipeError, UserError
from polm.recipe_judge import EndpointSettings
from polm.rewards.backends import Keep, Reply, Request, keep_nothing

# Busy, restarting or overloaded: the same request may succeed later.
PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
# Nobody can be asked: every further request would fail too.
REFUSING = frozenset((401, 402, 403, 404))
MAX_BYTES = 16 << 20
BLOCK = 1 << 16
TOP_LOGPROBS = 20
MAX_NOTE = 300


class _Failed(Exception):
    """An attempt that gave no reply. `passing`: worth another; `wait`: seconds that the server asks for."""

    def __init__(self, note: str, *, passing: bool, timeout: bool = False, wait: float = 0.0):
        super().__init__(note)
        self.passing, self.timeout, self.wait = passing, timeout, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class EndpointBackend:
    """Asks a server; build it with `build_endpoint`. `draw` gives a number in [0, 1), for the length of a wait."""

    settings: EndpointSettings
    key: str = field(repr=False, default="")
    draw: Callable[[], float] = random.random

    @property
    def name(self) -> str:
        """The model, with what is put into each request."""
        extra = self.settings.extra
        return f"endpoint:{self.settings.model}" + (f":{json.dumps(extra, sort_keys=True)}" if extra else "")

    def ask(self, requests: Sequence[Request], keep: Keep = keep_nothing) -> list[Reply]:
        """Raises UserError where the server refuses everybody (a wrong key, no such model)."""
        if not requests:
            return []

        stop = threading.Event()

        def ask_one(index: int) -> Reply:
            reply = self._ask(requests[index], stop)
            keep(index, reply)
            return reply

        with ThreadPoolExecutor(min(self.settings.concurrency, len(requests))) as pool:
            futures = [pool.submit(ask_one, index) for index in range(len(requests))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: Request, stop: threading.Event) -> Reply:
        """One question, with its retries; `stop` ends the waiting for another attempt."""
        body = json.dumps(self._build_body(request)).encode()
        s = self.settings
        for attempt in range(s.retries + 1):
            try:
                return _read_reply(self._post(body), request)
            except _Failed as failure:
                note = self._hide(str(failure))
                # Half of the wait is drawn, so that many who failed together do not come back together.
                wait = min(s.first_wait_seconds * 2.0**attempt, s.max_wait_seconds) * (0.5 + 0.5 * self.draw())
                last = attempt == s.retries or not failure.passing
                if failure.wait > s.max_wait_seconds:
                    last, note = True, f"{note}; it asks to wait {failure.wait:.0f} s (max_wait_seconds)"
                if last or stop.wait(max(wait, failure.wait)):
                    return Reply("timeout" if failure.timeout else "error", note=note)
        raise AssertionError("the last attempt returns")

    def _build_body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": 1 if request.options else request.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.options:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if request.temperature > 0:
            body["seed"] = request.seed
        return {name: value for name, value in {**body, **self.settings.extra}.items() if value is not None}

    def _post(self, body: bytes) -> bytes:
        """The body of one reply; _Failed, or UserError where nobody can be asked."""
        s = self.settings
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "polm"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{s.url.rstrip('/')}/chat/completions"
        deadline = time.monotonic() + s.timeout_seconds
        try:
            with _build_opener(url).open(
                urllib.request.Request(url, body, headers, method="POST"), timeout=s.timeout_seconds
            ) as response:
                return _read_body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._describe(error) from None
        except TimeoutError:
            raise _Failed(f"no reply within {s.timeout_seconds:g} s", passing=True, timeout=True) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Failed(f"no reply within {s.timeout_seconds:g} s", passing=True, timeout=True) from None
            raise _Failed(f"no connection: {error.reason}", passing=True) from None
        except (http.client.HTTPException, OSError) as error:
            raise _Failed(f"the reply broke off: {error!r}", passing=True) from None

    def _describe(self, error: urllib.error.HTTPError) -> _Failed:
        try:
            said = error.read(BLOCK).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        note = self._hide(f"status {error.code}: {' '.join(said.split())[:MAX_NOTE]}")
        if error.code in REFUSING:
            name = self.settings.api_key_env
            key = f"the key in {name}" if name else "api_key_env (none is set)"
            raise UserError(
                f"{self.settings.url} refuses the model {self.settings.model!r}: {note}. Check url, model and {key}; "
                "run again: what was answered before is kept"
            )
        return _Failed(note, passing=error.code in PASSING, wait=read_retry_after(error.headers.get("Retry-After")))

    def _hide(self, text: str) -> str:
        """Without the key, which some servers quote."""
        return text.replace(self.key, "***") if self.key else text


def build_endpoint(settings: EndpointSettings) -> EndpointBackend:
    """The backend of a server; RecipeError where the key's variable is not set."""
    key = ""
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key:
            raise RecipeError(
                f"endpoint.api_key_env: the environment variable {settings.api_key_env} is not set; export it, or "
                "leave api_key_env out where the server needs no key"
            )
        if not key.isascii() or not key.isprintable():
            raise RecipeError(f"endpoint.api_key_env: {settings.api_key_env} holds characters that no key has")
    return EndpointBackend(settings, key)


def _build_opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies of the environment, but not for this very machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    proxies = [urllib.request.ProxyHandler({})] if host in ("localhost", "127.0.0.1", "::1") else []
    return urllib.request.build_opener(_NoRedirects, *proxies)


def _read_body(response: Any, deadline: float) -> bytes:
    """The whole body before the deadline: a server that drips bytes must not hold us for ever."""
    parts, size = [], 0
    while True:
        if time.monotonic() > deadline:
            raise TimeoutError
        part = response.read1(BLOCK)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise _Failed(f"the reply is longer than {MAX_BYTES} bytes", passing=False)
    # `read1` takes the end of the connection for the end of the body.
    expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and size < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - size)
    return b"".join(parts)


def read_retry_after(value: str | None) -> float:
    """Seconds to wait from a Retry-After header: a number, or a date; 0 for none or one that cannot be read."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        then = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
        seconds = (then - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _read_reply(raw: bytes, request: Request) -> Reply:
    """The first choice of a chat completion; _Failed for anything else."""
    try:
        value = json.loads(raw)
        choice = value["choices"][0]
        content = choice["message"].get("content")
        if content is not None and not isinstance(content, str):
            raise TypeError("content")
        content = (content or "").encode("utf-8", "replace").decode()  # half a character cannot be written to a file
        if request.options:
            return Reply("answered", content, _read_logprobs(choice, request.options))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = " ".join(raw[:MAX_NOTE].decode("utf-8", "replace").split())
        raise _Failed(f"the reply is no chat completion: {shown}", passing=True) from None
    return Reply("answered", content, cut=choice.get("finish_reason") == "length")


def _read_logprobs(choice: Mapping[str, Any], options: Sequence[str]) -> tuple[float, ...]:
    """Log-probability of each option as the first token, over its spellings with and without spaces around."""
    found = choice.get("logprobs")
    if not found or not found.get("content"):
        raise _Failed("the server tells no log-probabilities; use verdict: text", passing=False)
    sums = dict.fromkeys(options, 0.0)
    for candidate in found["content"][0]["top_logprobs"]:
        token = str(candidate["token"]).strip()
        if token in sums:
            sums[token] += math.exp(float(candidate["logprob"]))
    return tuple(math.log(sums[option]) if sums[option] > 0 else -math.inf for option in options)
