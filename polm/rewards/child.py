"""A child process that answers one line of JSON for each line that it is sent, and that can be killed.

What must not take the trainer down with it runs there: symbolic mathematics on text that a model wrote, and reward
functions of users. The parent (`Child`) kills and restarts the process when an answer takes longer than its limit.
The child calls `serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from polm.errors import UserError

START_SECONDS = 120.0  # importing sympy or torch on a busy machine
# The child ends itself this long after its limit, in case the parent was killed and cannot.
GRACE_SECONDS = 5.0


class ChildEndedError(Exception):
    """The child closed its output: it crashed or was killed."""


@dataclass
class Child:
    """A long-lived child process; started at first use, restarted after a kill or a crash.

    module      what `python -m` runs, with `arguments`
    what, cure  for the message when it does not start: "the math verifier", "Is math-verify installed?"
    """

    module: str
    what: str
    cure: str
    arguments: tuple[str, ...] = ()
    num_starts: int = 0
    _child: subprocess.Popen[bytes] | None = None
    _owner: int = 0
    _errors: IO[bytes] | None = None
    _buffer: bytes = b""
    _finalizer: weakref.finalize[..., Any] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The child's answer to a request.

        Raises:
            TimeoutError: no answer after `seconds` of wall-clock time; the child was killed.
            ChildEndedError: the child crashed (out of memory, say).
            UserError: the child cannot be started.
        """
        with self._lock:
            try:
                self._send(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
                reply: dict[str, Any] = json.loads(self._receive(seconds))
            except BaseException:  # also an interrupt: a reply that comes later must not be taken for the next one's
                self.close()
                raise
            return reply

    def start(self) -> None:
        """Start the child now, so that what keeps it from starting is said at once."""
        with self._lock:
            self._ensure_child()

    def close(self) -> None:
        """Kills the child, if there is one of this process."""
        child, self._child, self._buffer = self._child, None, b""
        if child is None or self._owner != os.getpid():
            return
        if self._finalizer is not None:
            self._finalizer()
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
                    raise ChildEndedError from None

    def _ensure_child(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes are shared with the parent, who would read our replies: start an own child.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self.close()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # A file called sympy.py in the folder where the user works must not be imported.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, who ends the child at exit
        )
        self._owner = os.getpid()
        # With this object, or at the exit of Python, the process goes too.
        self._finalizer = weakref.finalize(self, end_process, self._child, self._owner)
        self.num_starts += 1
        try:
            self._receive(START_SECONDS)
        except (TimeoutError, ChildEndedError) as error:
            self._errors.seek(0)
            last = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
            self.close()
            raise UserError(f"{self.what} did not start: {last[0]}. {self.cure}") from error
        return self._child

    def _receive(self, seconds: float) -> bytes:
        """One line from the child; TimeoutError after `seconds`, ChildEndedError at the end of its output."""
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
                    raise ChildEndedError
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kills a process and what it has started, if it is one of this process's own and not of the one that this was
    forked from."""
    if os.getpid() != owner:
        return
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session, and so a group, of its own
        process.kill()
    process.wait()


def serve(prepare: Callable[[], Callable[[dict[str, Any]], Mapping[str, Any]]]) -> None:
    """The child's side: `prepare` loads what is needed and returns the function that answers a request; then one
    request a line until the input ends. Whatever is printed goes to the standard error output, so that it never looks
    like a reply, and whoever reads the standard input finds it empty."""
    replies, requests = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    answer = prepare()
    replies.write("{}\n")
    replies.flush()
    for line in requests:
        request = json.loads(line)
        _set_alarm(request["seconds"] + GRACE_SECONDS)
        reply = answer(request)
        _set_alarm(0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _set_alarm(seconds: float) -> None:
    """The default action of the alarm ends the process, even inside a long C call; 0 turns it off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
