"""One side of one comparison in a process of its own: `python -m bench.worker '{"work": ..., "side": ...}'`."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from bench.channel import Channel, Done, measure_calls
from bench.setup import Spec

SIZE = 1024  # of the square matrices whose product is the machine's peak


def measure_peak(channel: Channel, spec: Spec) -> None:
    """Products of square matrices for a third of a second; `flops` of the best of five stretches."""
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZE if device == "cpu" else 8 * SIZE
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def stretch(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    def call() -> dict[str, float]:
        count = max(1, round(0.06 / stretch(2)))
        return {"units": 2.0 * size**3 / min(stretch(count) for _ in range(5))}

    measure_calls(channel, call, None)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    channel = Channel()
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    try:
        if spec.side == "peak":
            measure_peak(channel, spec)
        elif spec.side in ("polm", "live", "ntp"):
            from bench import polm_side
            from polm.engine.device import keep_freed_memory

            keep_freed_memory()
            polm_side.RUNS[spec.work](channel, spec)
        else:
            from bench import peer_side

            peer_side.run(channel, spec)
    except Done:
        pass
    channel.finish()


if __name__ == "__main__":
    main()
