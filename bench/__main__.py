"""`make bench`: polm and its peers in alternation; writes BENCHMARKS.json and BENCHMARKS.md.

Each comparison runs its sides in processes of their own, one repetition of each after the other, and the machine's
matrix product in between. A finished comparison is written at once; with --resume those in the file are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from bench import report
from bench.setup import SHAPES, Spec, model_folder

ROOT = Path(__file__).parent.parent
MODELS = {
    "sft": ("10m", "50m", "smollm2-135m"),
    "dpo": ("10m", "50m"),
    "grpo": ("10m",),
    "generation-varying": ("10m", "50m"),
    "generation-equal": ("10m",),
    "scoring": ("10m",),
    "midtrain": ("10m",),
}
UNITS = {"sft": "tokens/s", "dpo": "pairs/s", "grpo": "steps/s", "scoring": "tokens/s", "midtrain": "tokens/s"}
BOTH = ("best", "defaults")
# Relative difference of the two sides' first losses that is let pass. The loss of DPO is made of small differences of
# sums over whole answers, whose last digits float32 does not keep.
GUARD = {"dpo": 1e-4}
GUARD_FP32, GUARD_BF16 = 1e-5, 1e-2


@dataclass
class Worker:
    """The benchmark's end of one worker process."""

    spec: Spec
    process: subprocess.Popen[str]
    guard: float | None = None
    results: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.spec} ended early; its messages are in {log_file(self.spec)}")
        return dict(json.loads(line))

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def measure(self) -> None:
        self.tell("go")
        self.results.append(self.read())

    def rates(self, part: str = "seconds") -> list[float]:
        return [r["units"] / r[part] for r in self.results]


def log_file(spec: Spec) -> Path:
    return ROOT / "bench" / ".cache" / f"{spec.work}-{spec.model}-{spec.side}.log"


@contextlib.contextmanager
def open_worker(spec: Spec) -> Iterator[Worker]:
    """Start a worker, wait until it is warm, and stop it at the end."""
    log_file(spec).parent.mkdir(parents=True, exist_ok=True)
    threads = str(spec.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    messages: IO[str]
    with log_file(spec).open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        worker = Worker(spec, process)
        try:
            worker.guard = worker.read()["guard"]
            yield worker
            worker.tell("quit")
            worker.peak_mb = worker.read()["peak_mb"]
        finally:
            process.kill()
            process.wait()


def compare(
    work: str, model: str, sides: Sequence[str], options: argparse.Namespace, deadline: float
) -> dict[str, Worker]:
    """Run the sides of a comparison in alternation; stops early at the deadline, with two repetitions at least."""
    spec = Spec(work, model, "polm", threads=options.threads, precision=options.precision, seconds=options.seconds)
    with contextlib.ExitStack() as stack:
        workers = {}
        for side in (*sides, "peak"):
            workers[side] = stack.enter_context(open_worker(replace(spec, side=side)))
            print(f"  {side}: ready", flush=True)
        check_guards(work, options.precision, [w for side, w in workers.items() if side != "peak"])
        for repeat in range(options.repeats):
            if repeat >= 2 and time.monotonic() > deadline:
                break
            for worker in workers.values():
                worker.measure()
    return workers


def check_guards(work: str, precision: str, workers: Sequence[Worker]) -> None:
    """Both sides must compute the same first loss before anything is timed."""
    found = [(w.spec.side, w.guard) for w in workers if w.guard is not None]
    limit = max(GUARD.get(work, 0.0), GUARD_BF16 if precision == "bf16" else GUARD_FP32)
    for side, guard in found[1:]:
        if not math.isclose(guard, found[0][1], rel_tol=limit):
            raise SystemExit(f"{work}: {found[0][0]} computes {found[0][1]}, {side} {guard}: not the same work")


def spread(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def build_rows(work: str, model: str, workers: dict[str, Worker], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each peer (the schema of BENCHMARKS.json)."""
    own, peak = workers["polm"], workers["peak"]
    shares = [r["flops"] / r["seconds"] / p["units"] for r, p in zip(own.results, peak.results, strict=True)]
    rows = []
    for side, worker in workers.items():
        if side in ("polm", "peak"):
            continue
        rows.append(
            {
                "work": work,
                "model": model,
                "threads": options.threads,
                "precision": options.precision,
                "peer": report.name_peer(work, side),
                "peer_settings": report.describe_peer(work, side),
                "unit": UNITS.get(work, "tokens/s"),
                **build_numbers(own.rates(), worker.rates()),
                # Seconds of processor time are steadier than those of the clock where other programs run.
                "cpu_ratio": median(a / b for a, b in zip(own.rates("cpu"), worker.rates("cpu"), strict=True)),
                "peak_share": median(shares),
                "peak_gflops": median(p["units"] for p in peak.results) / 1e9,
                "polm_peak_mb": own.peak_mb,
                "peer_peak_mb": worker.peak_mb,
            }
        )
        if work == "grpo":
            rows[-1]["parts"] = build_parts(own, worker)
    return rows


def build_numbers(own: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Medians, and the median of the ratios of neighbouring repetitions, which a slow spell hits alike."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {
        "polm_median": median(own),
        "peer_median": median(other),
        "ratio": median(ratios),
        "polm_range": spread(own),
        "peer_range": spread(other),
        "ratio_range": spread(ratios),
        "repeats": len(own),
    }


def build_parts(own: Worker, other: Worker) -> dict[str, Any]:
    """Generation and training of a GRPO step apart, seconds a step."""

    def seconds(worker: Worker, part: str) -> list[float]:
        if part == "generation":
            return [r["generation"] / r["units"] for r in worker.results]
        return [(r["seconds"] - r["generation"]) / r["units"] for r in worker.results]

    out = {}
    for part in ("generation", "training"):
        mine, theirs = seconds(own, part), seconds(other, part)
        out[part] = {
            "polm_seconds": median(mine),
            "peer_seconds": median(theirs),
            "ratio": median(b / a for a, b in zip(mine, theirs, strict=True)),
        }
    return out


def describe_machine(threads: int) -> dict[str, Any]:
    """What the numbers were taken on."""
    import torch
    import transformers

    facts = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "processor": facts.get("model name", platform.processor()),
        "vectors": wide,
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": read_version("trl"),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tune(options: argparse.Namespace) -> None:
    """Print the rate of each candidate setting of the peer, in alternation; nothing is written."""
    from bench import peer_side

    for work in options.work:
        if work not in peer_side.SETTINGS:
            continue
        for model in options.models or MODELS[work][:1]:
            sides = list(peer_side.SETTINGS[work])
            model_folder(model)
            workers = compare(work, model, sides, options, math.inf)
            for side in sorted(sides, key=lambda s: -median(workers[s].rates())):
                print(f"{work} {model} {side:22} {median(workers[side].rates()):10.4g} {workers[side].peak_mb:8.0f} MB")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--work", nargs="+", choices=[*MODELS, "curves"], default=[*MODELS, "curves"])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="default: those named in bench/README.md")
    parser.add_argument("--sides", nargs="+", choices=["best", "defaults"], help="of the peer; default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one repetition")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of all comparisons together, roughly")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: what this processor is fast in")
    parser.add_argument("--resume", action="store_true", help="keep the comparisons that the file already has")
    parser.add_argument("--tune", action="store_true", help="only try the peer's candidate settings")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of BENCHMARKS.json and BENCHMARKS.md")
    options = parser.parse_args(arguments)
    if options.precision is None:
        from polm.engine.device import pick_device, use_bf16

        options.precision = "bf16" if use_bf16("auto", pick_device()) else "fp32"
    return options


def main() -> None:
    options = parse()
    if options.tune:
        tune(options)
        return
    file = options.out / "BENCHMARKS.json"
    kept = json.loads(file.read_text()) if options.resume and file.is_file() else {}
    data = {
        "machine": describe_machine(options.threads),
        "rows": kept.get("rows", []),
        "curves": kept.get("curves", {}),
    }
    cells = [(w, m) for w in options.work if w != "curves" for m in options.models or MODELS[w]]
    deadline = time.monotonic() + 60 * options.minutes
    for number, (work, model) in enumerate(cells):
        if any(row["work"] == work and row["model"] == model for row in data["rows"]):
            print(f"{work} {model}: kept", flush=True)
            continue
        print(f"{work} {model}", flush=True)
        model_folder(model)
        model_folder(model, "reference")
        left = len(cells) - number
        until = time.monotonic() + max(0.0, deadline - time.monotonic()) / left
        sides = ["polm", *(["live", "ntp"] if work == "midtrain" else options.sides or BOTH)]
        workers = compare(work, model, sides, options, until)
        for row in build_rows(work, model, workers, options):
            data["rows"].append(row)
            print("  " + report.line(row), flush=True)
        write(options.out, data)
    if "curves" in options.work:
        from bench import curves

        shape = options.models[0] if options.models else curves.MODEL
        for name in curves.CURVES:
            if name not in data["curves"]:
                data["curves"][name] = curves.measure(name, shape, options.threads, options.precision)
                write(options.out, data)


def write(folder: Path, data: dict[str, Any]) -> None:
    """Both files, each replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("BENCHMARKS.json", json.dumps(data, indent=1) + "\n"), ("BENCHMARKS.md", report.build(data))):
        partial = folder / f".{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


if __name__ == "__main__":
    main()
