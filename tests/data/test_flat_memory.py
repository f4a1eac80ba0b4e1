"""A data set of any size streams through `sft`: what grows with it is a few bytes an example."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from polm.data import packing
from polm.data.examples import build_conversation_trees
from polm.data.packing import pack_trees
from polm.data.readers import iterate_conversations

BYTES_AN_EXAMPLE = 48
# Of the process alone: `ru_maxrss` begins with what its parent had.
CHILD = """
import sys
from pathlib import Path
from polm.recipe import SFTSettings
from polm.stages import sft
from polm.stages.common import Context
base, data, out = sys.argv[1:]
settings = SFTSettings(bin_tokens=64, updates=2, precision="fp32", threads=1)
sft.run(settings, Context(Path(out), {"base": base, "data": data}, say=lambda text: None))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write(path: Path, num_rows: int, padding: int) -> Path:
    """Chats of a few tokens, each beside a column of `padding` characters that nothing reads."""
    with path.open("w") as file:
        for number in range(num_rows):
            messages = [
                {"role": "user", "content": f"add {number % 7} and 2 ."},
                {"role": "assistant", "content": f"#### {number % 7}"},
            ]
            file.write(json.dumps({"messages": messages, "note": "x" * padding}) + "\n")
    return path


def measure_preparation(tokenizer: PreTrainedTokenizerFast, path: Path, folder: Path) -> int:
    """The most bytes that Python and NumPy held at a time from the file to the packed bins."""
    tracemalloc.start()
    try:
        chats = iterate_conversations(path)
        trees = build_conversation_trees(
            tokenizer, chats, context=64, too_long="error", train_on="all", ledger=Counter(), folder=folder
        )
        how: dict[str, Any] = {"bins_per_update": 1, "micro_bins": 0, "updates": 1, "epochs": None, "seed": 0}
        packed = pack_trees(trees, bin_tokens=64, **how)
        assert packed.count_unseen()[0] > 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_preparation_holds_a_few_bytes_an_example(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packing, "PACK_AT_ONCE", 64
    )  # small against both sizes, as it is against a data set of millions
    sizes = (250, 2000)
    files = [write(tmp_path / f"{size}.jsonl", size, 10) for size in sizes]
    measure_preparation(tiny_tokenizer, files[0], tmp_path)  # what is made once
    small, large = (measure_preparation(tiny_tokenizer, file, tmp_path) for file in files)
    assert large - small < BYTES_AN_EXAMPLE * (sizes[1] - sizes[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
def test_the_peak_of_sft_does_not_grow_with_the_file(artifact: Any, tmp_path: Path) -> None:
    """8 MB and 64 MB of the same rows."""
    peaks = []
    for num_rows in (64, 512):
        data = write(tmp_path / f"{num_rows}.jsonl", num_rows, 125_000)
        words = [sys.executable, "-c", CHILD, str(artifact("midtrain")), str(data), str(tmp_path / f"out{num_rows}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert abs(peaks[1] - peaks[0]) < 16, peaks
