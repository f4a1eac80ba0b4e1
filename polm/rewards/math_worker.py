"""Runs math-verify in a process of its own, so that hostile mathematics can be stopped.

Symbolic algebra on text that a model wrote may run for ever, eat memory or crash. The child (`main`) reads one JSON
request a line from its input and writes one JSON reply a line; the parent (`MathWorker`) kills and restarts it when
an item takes longer than its limit. math-verify's own alarms are off: they do not reach into long C calls.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from polm.errors import UserError

MathStatus = Literal["right", "wrong", "unparsed", "timeout", "error"]

START_SECONDS = 120.0  # importing sympy on a busy machine
MEMORY_BYTES = 4 * 2**30
# The child ends itself this long after its limit, in case the parent was killed and cannot.
GRACE_SECONDS = 5.0


class _ChildEnded(Exception):
    """The child closed its output: it crashed or was killed."""


@dataclass
class MathWorker:
    """A long-lived child process that compares answers; started at first use, restarted after a kill or a crash."""

    num_starts: int = 0
    _child: subprocess.Popen[bytes] | None = None
    _owner: int = 0
    _errors: IO[bytes] | None = None
    _buffer: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, text: str, answer: str, seconds: float) -> tuple[MathStatus, str]:
        """Compares the mathematics in `text` with `answer`, both as math-verify reads them.

        Returns:
            (status, the part of the text that was compared). "timeout" after `seconds` of wall-clock time, "error" if
            the child crashed (out of memory, say) or if `answer` itself cannot be read.

        Raises:
            UserError: the child cannot be started.
        """
        with self._lock:
            request = json.dumps({"text": text, "answer": answer, "seconds": seconds}).encode() + b"\n"
            try:
                self._send(request)
                reply = json.loads(self._receive(seconds))
            except TimeoutError:
                self.close()
                return "timeout", ""
            except _ChildEnded:
                self.close()
                return "error", ""
            except BaseException:  # an interrupt: a reply that comes later must not be taken for the next item's
                self.close()
                raise
            return reply["status"], reply["extracted"]

    def close(self) -> None:
        """Kills the child, if there is one of this process."""
        child, self._child, self._buffer = self._child, None, b""
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # a pipe whose other end is gone cannot be flushed
                    stream.close()

    def _send(self, request: bytes) -> None:
        """Writes to the child; one that died while it was idle is replaced once."""
        for attempt in range(2):
            child = self._ensure_child()
            assert child.stdin is not None
            try:
                child.stdin.write(request)
                child.stdin.flush()
                return
            except OSError:
                self.close()
                if attempt == 1:
                    raise _ChildEnded from None

    def _ensure_child(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes are shared with the parent, who would read our replies: start an own child.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self.close()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "polm.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # A file called sympy.py in the folder where the user works must not be imported.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, who ends the child at exit
        )
        self._owner = os.getpid()
        if self.num_starts == 0:
            atexit.register(self.close)
        self.num_starts += 1
        try:
            self._receive(START_SECONDS)
        except (TimeoutError, _ChildEnded) as error:
            self._errors.seek(0)
            last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            self.close()
            raise UserError(f"the math verifier did not start: {last[0]}. Is math-verify installed?") from error
        return self._child

    def _receive(self, seconds: float) -> bytes:
        """One line from the child; TimeoutError after `seconds`, _ChildEnded at the end of its output."""
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    raise _ChildEnded
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def main() -> None:
    """The child: one request a line until the input ends."""
    _limit_memory()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limits are off
    from math_verify import parse, verify

    parse("1", parsing_timeout=None)  # compiles its patterns now rather than within the first item's limit
    replies.write("{}\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _set_alarm(request["seconds"] + GRACE_SECONDS)
        reply = _judge(request["text"], request["answer"], parse, verify)
        _set_alarm(0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _judge(text: str, answer: str, parse: Any, verify: Any) -> dict[str, str]:
    try:
        gold = parse(answer, parsing_timeout=None)
        found = parse(text, parsing_timeout=None)
        extracted = next((part for part in reversed(found) if isinstance(part, str)), "")
        if not found or not gold:
            return {"status": "unparsed" if gold else "error", "extracted": extracted}
        right = verify(gold, found, timeout_seconds=None)
        return {"status": "right" if right else "wrong", "extracted": extracted}
    except Exception as error:  # noqa: BLE001 - any failure inside symbolic algebra is this item's, not ours
        return {"status": "error", "extracted": f"{type(error).__name__}"}


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, OSError, ValueError):  # not every system has such limits; the time limit remains
        return


def _set_alarm(seconds: float) -> None:
    """The default action of the alarm ends the process, even inside a long C call; 0 turns it off."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
