"""How a worker process and the benchmark talk: one JSON object a line, over what was the worker's standard output.

The worker sends {"ready": ..., "guard": ...}; then, for each "go" that it reads, one measurement; at "quit" its peak
memory. Only one worker runs at a time, the others wait at a read.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Done(Exception):
    """The benchmark has told this worker to stop."""


class Channel:
    """The worker's end. Standard output goes to standard error from here on: libraries print there."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """Block until "go". Raises Done at "quit" or at the end of the input."""
        if sys.stdin.readline().strip() != "go":
            raise Done

    def finish(self) -> None:
        self.send(peak_mb=read_peak_mb())


def read_peak_mb() -> float:
    """The largest resident size of this process. On Linux from its status: `ru_maxrss` begins with the size that the
    parent had, whatever the child became."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """Times repetitions inside a loop that belongs to somebody else: `tick` is called after each of its steps.

    The first `warmup` steps are not measured; from the last of them it learns how many steps fill `seconds`.
    """

    def __init__(self, channel: Channel, seconds: float, warmup: int = 2, guard: float | None = None):
        self.channel, self.seconds, self.warmup, self.guard = channel, seconds, warmup, guard
        self.steps = 0
        self.per_repeat = 1
        self._reset()

    def _reset(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def tick(self, **sums: float) -> None:
        """One step is over; `sums` (units, flops, seconds of a part) are added up over the repetition."""
        now = time.perf_counter()
        self.steps += 1
        self.count += 1
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.steps < self.warmup:
            self._reset()
        elif self.steps == self.warmup:
            self.per_repeat = max(1, round(self.seconds / max(1e-6, now - self.began)))
            self.channel.send(ready=True, guard=self.guard, steps_per_repeat=self.per_repeat)
            self.channel.wait()
            self._reset()
        elif self.count == self.per_repeat:
            self.channel.send(seconds=now - self.began, cpu=time.process_time() - self.cpu_began, **self.sums)
            self.channel.wait()
            self._reset()


def measure_calls(channel: Channel, call: Any, guard: float | None, warmup: int = 1) -> None:
    """Measure a function that returns its sums; each call is one repetition. Ends with Done."""
    for _ in range(warmup):
        call()
    channel.send(ready=True, guard=guard, steps_per_repeat=1)
    while True:
        channel.wait()
        began, cpu_began = time.perf_counter(), time.process_time()
        sums = call()
        channel.send(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu_began, **sums)
