from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest

from polm.errors import UserError
from polm.rewards import verify as verify_module
from polm.rewards.math_worker import MathWorker
from polm.rewards.verify import Verdict, VerifyItem, verify, verify_many


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    """One child for the whole file: starting it costs a second."""
    worker = MathWorker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "_WORKER", worker)
        yield worker
    worker.close()


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("so #### a  b", "a b", Verdict("right", "a  b")),
        ("#### a #### b\nc", "b", Verdict("right", "b")),
        ("#### A", "a", Verdict("wrong", "A")),
        ("a b", "a b", Verdict("unparsed", "")),
        ("####  ", "a", Verdict("unparsed", "")),
    ],
)
def test_exact(completion: str, answer: str, verdict: Verdict) -> None:
    assert verify("exact", completion, answer) == verdict


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("16 - 3 = 13 #### 13", "13", Verdict("right", "13")),
        ("first 13 and then 14", "13", Verdict("wrong", "14")),
        ("It is $1,200.50.", "1200.5", Verdict("right", "1,200.50")),
        ("x = -3.", "-3", Verdict("right", "-3")),
        ("7-3", "3", Verdict("right", "3")),
        ("1000001 #### 1000000", "1,000,001", Verdict("right", "1000000")),
        ("#### 100 ducks", "100", Verdict("right", "100")),
        ("5 but #### none", "5", Verdict("unparsed", "none")),
        ("nothing, N0 or A4", "5", Verdict("unparsed", "")),
        ("9" * 400, "9", Verdict("wrong", "9" * 400)),
        ("0.3333333", "0.33333333", Verdict("right", "0.3333333")),
    ],
)
def test_number(completion: str, answer: str, verdict: Verdict) -> None:
    assert verify("number", completion, answer) == verdict


@pytest.mark.parametrize(
    ("completion", "answer", "numbers", "verdict"),
    [
        ("#### N0 + N1", "7", [3, 4], Verdict("right", "N0 + N1")),
        ("#### N1 + N0", "7", [3, 4], Verdict("right", "N1 + N0")),
        ("#### N0 * N1", "7", [3, 4], Verdict("wrong", "N0 * N1")),
        ("#### ( N0 + N1 ) / 2", "3.5", [3, 4], Verdict("right", "( N0 + N1 ) / 2")),
        ("#### N0 +", "7", [3, 4], Verdict("unparsed", "N0 +")),
        ("#### N2", "7", [3, 4], Verdict("unparsed", "N2")),
        ("#### 7", "7", None, Verdict("right", "7")),
        ("#### N0 / 0", "7", [3], Verdict("unparsed", "N0 / 0")),
        ("#### __import__('os').getpid()", "7", [3], Verdict("unparsed", "__import__('os').getpid()")),
        ("N0 + N1", "7", [3, 4], Verdict("unparsed", "")),
    ],
)
def test_expression(completion: str, answer: str, numbers: list[float] | None, verdict: Verdict) -> None:
    assert verify("expression", completion, answer, numbers) == verdict


def test_users_mistakes() -> None:
    with pytest.raises(UserError, match="unknown verifier 'maths'; allowed are exact, expression, math, number"):
        verify("maths", "1", "1")
    with pytest.raises(UserError, match="\"number\" needs a number as the answer, found 'seven'"):
        verify("number", "7", "seven")
    with pytest.raises(UserError, match='"expression" needs a number as the answer'):
        verify("expression", "no marker here", "x", [1])


def test_plain_numbers_need_no_worker(worker: MathWorker) -> None:
    before = worker.num_starts
    assert verify("math", r"so \boxed{1,200}", "1200") == Verdict("right", "1,200")
    assert verify("math", "#### $5.", "5") == Verdict("right", "$5.")
    assert verify("math", r"\boxed{6}", "5") == Verdict("wrong", "6")
    assert verify("math", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}").status == "right"
    assert verify("math", "#### ", "5") == Verdict("unparsed", "")
    assert worker.num_starts == before


@pytest.mark.parametrize(
    ("completion", "answer", "status"),
    [
        (r"so $\boxed{0.5}$", r"\frac{1}{2}", "right"),
        (r"#### 5\sqrt{2}", r"\sqrt{50}", "right"),
        (r"#### 5\sqrt{2}", "5", "wrong"),
        (r"\boxed{1} #### $\frac{2}{4}$", r"\frac{1}{2}", "right"),
        (r"#### 7, no: \boxed{\frac{2}{4}}", r"\frac{1}{2}", "right"),
        (r"\boxed{(1, 2]}", "(1,2]", "right"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", "right"),
        (r"\boxed{\text{Monday}}", r"\text{Tuesday}", "wrong"),
        ("the answer is 3/4", "0.75", "right"),
        ("I do not know", "0.75", "unparsed"),
        ("", r"\pi", "unparsed"),
    ],
)
def test_math(worker: MathWorker, completion: str, answer: str, status: str) -> None:
    assert verify("math", completion, answer).status == status
    assert worker.num_starts >= 1


def test_endless_mathematics_is_stopped_and_the_next_item_judged(worker: MathWorker) -> None:
    starts = max(worker.num_starts, 1)
    begin = time.monotonic()
    items = [
        VerifyItem("math", r"\boxed{x+1}", "1+x"),
        VerifyItem("math", r"\boxed{99999^{99999^{99999}}}", r"3\pi"),
        VerifyItem("math", r"\boxed{x+1}", "1+x"),
        VerifyItem("number", "4", "4"),
    ]
    statuses = [verdict.status for verdict in verify_many(items, seconds=1.0)]
    assert statuses == ["right", "timeout", "right", "right"]
    assert worker.num_starts == starts + 1
    assert time.monotonic() - begin < 20


def test_a_killed_child_is_an_error_or_is_replaced(worker: MathWorker) -> None:
    assert verify("math", "#### x", "2x").status == "wrong"
    child = worker._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)  # while it is idle: the next item gets a new child
    child.wait()
    assert verify("math", "#### x+x", "2x").status == "right"
    child = worker._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)  # it takes the request but does not answer
    assert verify("math", "#### x+x", "2x", seconds=0.3).status == "timeout"
    assert child.poll() is not None
    assert verify("math", "#### x+x", "2x").status == "right"


def test_a_crash_within_an_item_is_an_error(worker: MathWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify("math", "#### x+x", "2x").status == "right"
    child = worker._child
    assert child is not None
    receive = MathWorker._receive

    def receive_after_crash(self: MathWorker, seconds: float) -> bytes:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        self._buffer = b""
        return receive(self, seconds)

    os.kill(child.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(MathWorker, "_receive", receive_after_crash)
        assert verify("math", "#### x+x", "2x").status == "error"
    assert verify("math", "#### x+x", "2x").status == "right"


@pytest.mark.usefixtures("worker")
def test_an_interrupt_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify("math", "#### x+x", "2x").status == "right"

    def interrupt(_self: MathWorker, _seconds: float) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MathWorker, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            verify("math", "#### x+x", "2x")
    assert verify("math", "#### x+y", "2x").status == "wrong"


def test_a_worker_that_cannot_start_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polm.rewards.child.sys.executable", shutil.which("false"))
    broken = MathWorker()
    with pytest.raises(UserError, match="the math verifier did not start: no message"):
        broken.judge("1", "1", 1.0)
    assert broken._child is None
