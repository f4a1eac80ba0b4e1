"""Decoding steps of fixed shapes, recorded once and played again: CUDA graphs.

A decoding step launches some hundred short kernels, and on a GPU the host takes longer to launch them than they run.
A recorded step is launched as one. It can change nothing but the numbers in its buffers, so live rows and the
positions that they look back on are rounded up to a few sizes, each with a recording of its own: spare rows come along
and nobody reads what they give, and positions that a row has not reached are masked.

The second step of a size is recorded, and held against the same step as it is. Where a step asks the device for a
number, which a recording cannot hold, where recording fails, or where it gives other numbers, this process records no
more, and manifests say so.

Shape suffixes: R rows, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from polm.models.kernels.build import explain_switch
from polm.models.kernels.proof import WaitingOperations, describe, note
from polm.rollout.cache import round_width
from polm.tokens import Array

NAME = "CUDA graphs"
LEAST_POSITIONS = 128
TOLERANCE = 1e-3  # of the largest logit; a recording runs the same kernels

# Logits of one token a row: (tokens [R], positions [R], number of positions to look back on) -> [R, V] float32
StepFunction = Callable[[Tensor, Tensor, int], Tensor]
Play = Callable[[], None]
# Records what a function does to the tensors that it is given, and returns what does it again.
Recorder = Callable[[Callable[[Tensor, Tensor, Tensor], None], tuple[Tensor, Tensor, Tensor]], Play]


_given_up: set[torch.device] = set()  # where a recording failed


def choose_recorder(device: torch.device) -> Recorder | None:
    """How steps are recorded on a device; None where they are not."""
    wanted = device.type == "cuda" and explain_switch() is None and device not in _given_up
    return CudaRecorder() if wanted else None


class CudaRecorder:
    """Records CUDA graphs, which share the memory of what they compute on their way: only one is played at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, function: Callable[[Tensor, Tensor, Tensor], None], buffers: tuple[Tensor, Tensor, Tensor]
    ) -> Play:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the pool is apart: what lies free elsewhere is of no use to it
        # Not `torch.cuda.graph`: where the end of a capture fails, it leaves the process on the capture's stream.
        torch.cuda.set_stream(stream)
        try:
            # Other threads (a judge's, a progress bar's) may go on with what they do.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                function(*buffers)
            finally:
                graph.capture_end()
        finally:
            torch.cuda.set_stream(before)
        return graph.replay


def choose_size(rows: int, end: int, num_slots: int, length: int) -> tuple[int, int]:
    """(rows, positions to look back on) of the step that serves so many: rows up to a power of two, positions up to one
    of four sizes an octave from 128 on, at most what there is."""
    return min(1 << (rows - 1).bit_length(), num_slots), min(max(LEAST_POSITIONS, round_width(end)), length)


class RecordedSteps:
    """Runs decoding steps of one model, recorded where a size comes again. Its buffers belong to it alone."""

    def __init__(
        self, function: StepFunction, recorder: Recorder, num_slots: int, length: int, vocab: int, device: torch.device
    ):
        self.function, self.num_slots, self.length = function, num_slots, length
        self.recorder: Recorder | None = recorder
        self.tokens_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.positions_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.logits_SV = torch.zeros((num_slots, vocab), dtype=torch.float32, device=device)
        self.met: set[tuple[int, int]] = set()
        self.plays: dict[tuple[int, int], Play] = {}

    @property
    def given_up(self) -> bool:
        return self.recorder is None

    def run(self, tokens_R: Array, positions_R: Array) -> Tensor:
        """The logits [R, V] of each row's next token; they are overwritten by the next call."""
        rows = len(tokens_R)
        size = choose_size(rows, int(positions_R.max()) + 1, self.num_slots, self.length)
        # The spare rows stand at a place that is in use.
        spare = (0, size[0] - rows)
        self.tokens_S[: size[0]].copy_(torch.from_numpy(np.pad(tokens_R, spare)))
        self.positions_S[: size[0]].copy_(torch.from_numpy(np.pad(positions_R, spare, mode="edge")))
        play = self.plays.get(size)
        if play is not None:
            play()
        elif size in self.met and self.recorder is not None:
            self._record(size, self.recorder)
        else:
            self.met.add(size)
            self._step(size)
        return self.logits_SV[:rows]

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens_S[:rows], self.positions_S[:rows], self.logits_SV[:rows]

    def _write(self, end: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def write(tokens_R: Tensor, positions_R: Tensor, logits_RV: Tensor) -> None:
            logits_RV.copy_(self.function(tokens_R, positions_R, end))

        return write

    def _step(self, size: tuple[int, int]) -> None:
        self._write(size[1])(*self._buffers(size[0]))

    def _record(self, size: tuple[int, int], recorder: Recorder) -> None:
        """Run the step, and record it if it can be and gives the same again."""
        with WaitingOperations() as waiting:  # a capture that fails may leave a process worse off: ask before
            self._step(size)
        logits_RV = self.logits_SV[: size[0]]
        expected_RV = logits_RV.clone()
        if waiting.asked:
            absence: str | None = f"the step waits for the device ({waiting.asked[0]})"
        else:
            absence = self._try_to_record(size, recorder, expected_RV)
        note(NAME, absence)
        if absence is not None:
            _given_up.add(logits_RV.device)
            self.recorder = None
            self.plays.clear()
            logits_RV.copy_(expected_RV)

    def _try_to_record(self, size: tuple[int, int], recorder: Recorder, expected_RV: Tensor) -> str | None:
        logits_RV = self.logits_SV[: size[0]]
        try:
            play = recorder(self._write(size[1]), self._buffers(size[0]))
            logits_RV.zero_()
            play()
            gap = float((logits_RV - expected_RV).abs().max() / expected_RV.abs().max().clamp(min=1e-9))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a capture fails in many ways, and none is a reason to stop)
            return f"cannot record here: {describe(error)}"
        # Logits that are no numbers are the caller's to report.
        if gap > TOLERANCE and bool(torch.isfinite(expected_RV).all()):
            return f"differ from the steps that they record by {gap:.1g}"
        self.plays[size] = play
        return None
