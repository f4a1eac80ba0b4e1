"""An OpenAI-compatible server as a judge: what is sent, what is tried again, what a failure is called."""

from __future__ import annotations

import json
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from polm.errors import RecipeError, UserError
from polm.recipe_judge import EndpointSettings
from polm.rewards.backends import Request
from polm.rewards.endpoint import EndpointBackend, build_endpoint, read_retry_after

FAST: dict[str, Any] = {"first_wait_seconds": 0.005, "max_wait_seconds": 1.0, "timeout_seconds": 5.0, "retries": 3}
KEY = "sk-test-0123456789"


def ask(text: str, **changes: Any) -> Request:
    return Request(({"role": "user", "content": text},), **changes)


def build(server: Any, **changes: Any) -> Any:
    return build_endpoint(EndpointSettings(url=server.url, model="m", **{**FAST, **changes}))


def test_what_is_sent(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    server = chat_server(lambda body, _: f"said {body['messages'][0]['content']}")
    backend = build(server, api_key_env="MY_KEY", extra={"top_p": 0.5, "max_completion_tokens": 9, "max_tokens": None})
    replies = backend.ask([ask("hi"), ask("ho", temperature=0.7, seed=3)])
    assert [reply.text for reply in replies] == ["said hi", "said ho"]
    first, second = sorted(server.bodies, key=lambda body: body["temperature"])
    message = {"role": "user", "content": "hi"}
    assert first == {
        **{"model": "m", "messages": [message], "temperature": 0.0, "top_p": 0.5},
        "max_completion_tokens": 9,
    }
    assert (second["temperature"], second["seed"]) == (0.7, 3)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert KEY not in repr(backend)


@pytest.mark.parametrize("failure", [429, 500, 503, "garbage", "cut", "empty", "dropped"])
def test_what_may_pass_is_tried_again(chat_server: Any, failure: Any) -> None:
    def reply(_: Any, number: int) -> Any:
        if number >= 2:
            return "fine"
        if failure == "garbage":
            return 200, {}, b"<html>not json"
        if failure == "cut":
            return 200, {"Content-Length": "5000"}, b'{"choices": [{"mess'
        if failure == "empty":
            return {"choices": []}
        if failure == "dropped":
            raise ConnectionResetError  # the handler dies: the connection closes without a word
        return failure, {}, b"busy"

    server = chat_server(reply)
    server_errors = [reply.status for reply in build(server).ask([ask("hi")])]
    assert server_errors == ["answered"]
    assert len(server.bodies) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ((500, {}, b"out of order"), "status 500: out of order"),
        ((200, {}, b"<html>"), "no chat completion: <html>"),
        ((200, {"Content-Length": "5000"}, b'{"choices"'), "broke off"),
        ({"choices": [{"message": {"content": ["a"]}}]}, "no chat completion"),
        ({"error": "x"}, "no chat completion"),
    ],
)
def test_what_does_not_pass_is_an_error(chat_server: Any, answer: Any, note: str) -> None:
    server = chat_server(lambda *_: answer)
    (reply,) = build(server, retries=1).ask([ask("hi")])
    assert reply.status == "error"
    assert note in reply.note
    assert len(server.bodies) == 2


def test_a_bad_question_is_not_asked_twice(chat_server: Any) -> None:
    """Too long, say: the others go through."""
    server = chat_server(lambda body, _: (400, {}, b"too long") if len(str(body)) > 300 else "fine")
    replies = build(server).ask([ask("x" * 400), ask("y")])
    assert [(reply.status, reply.note) for reply in replies] == [("error", "status 400: too long"), ("answered", "")]
    assert len(server.bodies) == 2


def test_too_slow_is_a_timeout(chat_server: Any) -> None:
    server = chat_server(lambda *_: time.sleep(0.6) or "late")
    begin = time.monotonic()
    (reply,) = build(server, timeout_seconds=0.1, retries=1).ask([ask("hi")])
    assert reply.status == "timeout"
    assert "within 0.1 s" in reply.note
    assert time.monotonic() - begin < 0.55
    assert len(server.bodies) == 2


def test_dripping_bytes_is_a_timeout_too() -> None:
    """Each byte comes in time, the reply as a whole never does."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.03)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    settings = EndpointSettings(url=url, model="m", **{**FAST, "timeout_seconds": 0.2, "retries": 0})
    begin = time.monotonic()
    (reply,) = build_endpoint(settings).ask([ask("hi")])
    assert reply.status == "timeout"
    assert time.monotonic() - begin < 1.0
    listener.close()


def test_nobody_there_is_an_error() -> None:
    settings = EndpointSettings(url="http://127.0.0.1:9/v1", model="m", **{**FAST, "retries": 1})
    (reply,) = build_endpoint(settings).ask([ask("hi")])
    assert reply.status == "error"
    assert "no connection" in reply.note


def test_retry_after_is_honoured(chat_server: Any) -> None:
    times: list[float] = []

    def reply(*_: Any) -> Any:
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.3"}, b"slow down") if len(times) == 1 else "fine"

    (answer,) = build(chat_server(reply)).ask([ask("hi")])
    assert answer.text == "fine"
    assert times[1] - times[0] >= 0.3


def test_a_wait_that_is_too_long_ends_it(chat_server: Any) -> None:
    server = chat_server(lambda *_: (429, {"Retry-After": "3600"}, b"tomorrow"))
    (reply,) = build(server).ask([ask("hi")])
    assert reply.status == "error"
    assert "asks to wait 3600 s" in reply.note
    assert len(server.bodies) == 1


def test_reading_retry_after() -> None:
    assert read_retry_after(None) == 0
    assert read_retry_after("2.5") == 2.5
    assert read_retry_after("-3") == 0
    assert read_retry_after("soon") == 0
    assert read_retry_after("nan") == 0
    later = datetime.now(UTC) + timedelta(seconds=50)
    assert 45 < read_retry_after(format_datetime(later, usegmt=True)) <= 50
    assert read_retry_after(format_datetime(later - timedelta(hours=1), usegmt=True)) == 0


class Clock(threading.Event):
    """Notes how long it is waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


def test_waits_grow_and_are_drawn(chat_server: Any) -> None:
    server = chat_server(lambda *_: (503, {}, b"busy"))
    settings = EndpointSettings(url=server.url, model="m", first_wait_seconds=1, max_wait_seconds=3, retries=4)
    clock = Clock()
    assert EndpointBackend(settings, draw=lambda: 1.0)._ask(ask("hi"), clock).status == "error"
    assert clock.waits == [1.0, 2.0, 3.0, 3.0]
    clock = Clock()
    EndpointBackend(settings, draw=lambda: 0.0)._ask(ask("hi"), clock)
    assert clock.waits == [0.5, 1.0, 1.5, 1.5]


def test_no_more_than_so_many_at_once(chat_server: Any) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def reply(*_: Any) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        return "fine"

    replies = build(chat_server(reply), concurrency=3).ask([ask(str(i)) for i in range(12)])
    assert len(replies) == 12
    assert 2 <= most <= 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everybody_stops_the_run(
    chat_server: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """And the key that it quotes is not told."""
    monkeypatch.setenv("MY_KEY", KEY)
    server = chat_server(lambda *_: (status, {}, f"wrong key {KEY}".encode()))
    backend = build(server, api_key_env="MY_KEY", concurrency=1)
    with pytest.raises(UserError, match=rf"refuses the model 'm': status {status}: wrong key \*\*\*.*in MY_KEY") as e:
        backend.ask([ask(str(i)) for i in range(50)])
    assert KEY not in str(e.value)
    assert len(server.bodies) < 5


def test_the_key_is_in_no_note(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    for answer in ((400, {}, f"odd {KEY}".encode()), (200, {}, f"odd {KEY}".encode())):
        server = chat_server(lambda *_, answer=answer: answer)
        (reply,) = build(server, api_key_env="MY_KEY", retries=0).ask([ask("hi")])
        assert "odd ***" in reply.note
        assert KEY not in reply.note


def test_a_redirect_is_not_followed(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    thief = chat_server(lambda *_: "stolen")
    server = chat_server(lambda *_: (302, {"Location": f"{thief.url}/chat/completions"}, b""))
    (reply,) = build(server, api_key_env="MY_KEY").ask([ask("hi")])
    assert reply.status == "error"
    assert thief.bodies == []


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    settings = EndpointSettings(url="http://127.0.0.1:9/v1", model="m", api_key_env="MY_KEY")
    with pytest.raises(RecipeError, match="the environment variable MY_KEY is not set; export it"):
        build_endpoint(settings)
    monkeypatch.setenv("MY_KEY", "a\nb")
    with pytest.raises(RecipeError, match="characters that no key has"):
        build_endpoint(settings)


def test_likelihoods_of_options(chat_server: Any) -> None:
    top = [("A", 0.5), (" A", 0.1), ("B", 0.2), ("Banana", 0.1)]
    tokens = [{"token": token, "logprob": math.log(p)} for token, p in top]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": tokens}]}}
    server = chat_server(lambda *_: {"choices": [choice]})
    (reply,) = build(server).ask([ask("hi", options=("A", "B", "C"))])
    assert [math.exp(value) for value in reply.logprobs] == pytest.approx([0.6, 0.2, 0.0])
    body = server.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)


def test_a_server_without_likelihoods_says_so(chat_server: Any) -> None:
    server = chat_server(lambda *_: "A")
    (reply,) = build(server).ask([ask("hi", options=("A", "B"))])
    assert (reply.status, len(server.bodies)) == ("error", 1)
    assert "use verdict: text" in reply.note


def test_half_a_character(chat_server: Any) -> None:
    server = chat_server(lambda *_: (200, {}, b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}'))
    (reply,) = build(server).ask([ask("hi")])
    assert reply.text == "a ? b"


def test_the_key_is_no_part_of_settings() -> None:
    settings = EndpointSettings(url="http://127.0.0.1:9/v1", model="m", api_key_env="MY_KEY")
    assert KEY not in json.dumps(settings.model_dump())
