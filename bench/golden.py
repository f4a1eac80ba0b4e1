"""Loss curves in float32 to the last bit, for a look before and after a change of the engine.

    python -m bench.golden            # before
    python -m bench.golden            # after, on the same machine and torch: the same lines, or the change says why not

Bits depend on the processor, on torch and on the number of threads, so nothing is committed to compare with.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.setup import SHAPES, Spec, documents, instructions, model_folder, preferences, questions
from polm.data.packing import pack_trees
from polm.data.tree_store import AttachedTrees
from polm.engine.annotate import annotate_trees
from polm.engine.fit import fit
from polm.models.loading import load_model
from polm.objectives.ntp import build_ntp
from polm.objectives.policy_gradient import build_policy_gradient
from polm.objectives.preference import Knobs, build_preference
from polm.objectives.remit import build_remit
from polm.recipe import OptimizerSettings, TrainSettings
from polm.tokens import Objective, Tree, build_completions, build_document

SPEC = Spec("golden", "tiny", "polm", threads=1)
NUM_UPDATES = 6


def build_works() -> dict[str, tuple[list[Tree], Objective, str]]:
    """Trees, objective and the stream that the reference's scores go into, of each work."""
    vocab = SHAPES[SPEC.model]["vocab_size"]
    marks = [{"sign": 1.0}, {"sign": -1.0}]
    rng = np.random.default_rng(0)
    groups = []
    for prompt in questions(vocab, 40, 0):
        answers = [rng.integers(3, vocab, 30) for _ in range(4)]
        streams = [{"advantages": np.full(30, a, dtype=np.float32)} for a in rng.normal(size=4)]
        groups.append(build_completions(prompt, answers, streams))
    remit = build_remit(
        eps=0.8, temperature=1.0, centring="sequence", base="live", denominator="tokens", shuffled=False
    )
    clipped = build_policy_gradient(
        clip_low=0.2, clip_high=0.2, kl_beta=0.0, normalize="tokens", max_completion_tokens=30, log_entropy=True
    )
    return {
        "sft": ([build_completions(p, [a]) for p, a in instructions(vocab, 80, 0)], build_ntp(), ""),
        "remit": ([build_document(ids) for ids in documents(vocab, 40, 0)], remit, "ref_logprobs"),
        "dpo": (
            [build_completions(p, [good, bad], marks=marks) for p, good, bad in preferences(vocab, 60, 0)],
            build_preference("sigmoid", Knobs(beta=0.1)),
            "ref_logprobs",
        ),
        "grpo": (groups, clipped, "old_logprobs"),
    }


def run(trees: list[Tree], objective: Objective, stream: str, kind: str) -> tuple[list[str], str]:
    """(losses and gradient norms as hexadecimal floats, hash of the weights at the end)."""
    model = load_model(model_folder(SPEC.model))
    given: Any = trees
    if stream:
        reference = load_model(model_folder(SPEC.model, "reference"))
        given = AttachedTrees(trees, {stream: annotate_trees(reference, trees, bin_tokens=1024, bf16=False).logprobs})
    source = pack_trees(
        given, bin_tokens=1024, bins_per_update=2, micro_bins=1, updates=NUM_UPDATES, epochs=None, seed=0
    )
    settings = TrainSettings(
        updates=NUM_UPDATES, precision="fp32", log_every=1, optimizer=OptimizerSettings(kind=kind, learning_rate=1e-3)
    )
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            source,
            objective,
            settings,
            Path(folder),
            report=lambda line: lines.append(f"{float(line['loss']).hex()} {float(line['grad_norm']).hex()}"),
        )
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    return lines, digest.hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(SPEC.threads)
    for name, (trees, objective, stream) in build_works().items():
        for kind in ("adamw", "muon"):
            lines, digest = run(trees, objective, stream, kind)
            print(f"{name} {kind} weights {digest}")
            print("".join(f"  {line}\n" for line in lines), end="")


if __name__ == "__main__":
    main()
