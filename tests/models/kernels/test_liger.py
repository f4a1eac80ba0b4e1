"""The row kernels of a GPU: what calls them, what decides whether they are taken, and, where Triton is, the kernels.

Triton runs its kernels on a CPU in its interpreter, in float32. That shows their numbers and says nothing of a GPU's
compiler.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from polm.engine.fit import accumulate
from polm.models.kernels import install, liger, proof
from polm.models.kernels.build import explain_absence
from polm.models.kernels.liger import explain_liger_absence
from polm.objectives.ntp import build_ntp
from polm.tokens import build_completions, build_document, collate

CPU = torch.device("cpu")
absent = [name for name in ("triton", "liger_kernel") if find_spec(name) is None]
needs_triton = pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed (pip install 'polm[gpu]')")
needs_install = pytest.mark.skipif(explain_absence() is not None, reason=f"no layer is replaced: {explain_absence()}")


def plain_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, style: str, in_place: bool, row_mode: None
) -> torch.Tensor:
    assert (offset, style, in_place, row_mode) == (0.0, "llama", False, None)
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)


def plain_rope(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]).to(x.dtype)

    return turn(query), turn(key)


def plain_silu_mul(gate: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * upper


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    explain_liger_absence.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel's functions as plain operations of the same signatures."""
    monkeypatch.setattr(liger, "find_spec", lambda _: "here")
    monkeypatch.setattr(liger, "_load", lambda: liger._Functions(plain_norm, plain_rope, plain_silu_mul))


@needs_install
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_layers_that_call_them_compute_what_they_did(
    family: str, build_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 they are as near to the gradients of float64 as the layers' own code is."""
    model = build_tiny(97, architecture=family)
    ids = torch.randint(1, 97, (60,), generator=torch.Generator().manual_seed(1)).numpy()
    batch = collate([build_document(ids[:20]), build_completions(ids[20:30], [ids[30:45], ids[45:]])])
    double = copy.deepcopy(model).double()
    accumulate(double, [batch], build_ntp(), 1.0, False)
    exact = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
    errors, calls = [], []
    for kernels in (install.GPU, None):

        def choose(_: torch.Tensor, kernels: install.RowKernels | None = kernels) -> install.RowKernels | None:
            calls.append(kernels)
            return kernels

        monkeypatch.setattr(install, "choose_kernels", choose)
        accumulate(model, [batch], build_ntp(), 1.0, True)
        gaps = [(p.grad.double() - exact[n]).norm() ** 2 for n, p in model.named_parameters() if p.grad is not None]
        errors.append(float(sum(gaps)) ** 0.5 / float(sum(g.norm() ** 2 for g in exact.values())) ** 0.5)
        model.zero_grad(set_to_none=True)
    assert len(calls) == 2 * (5 + 2 + 2)  # norms, attentions and feed-forwards
    assert 0.0 < errors[0] < 1.2 * errors[1] < 0.1


@pytest.mark.usefixtures("stand_ins")
def test_right_numbers_pass_and_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_found", {})
    assert explain_liger_absence(CPU, torch.float32) is None
    assert proof.describe_proofs() == "liger-kernel (float32): in use"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["norm", "rope", "silu_mul"])
def test_wrong_numbers_do_not_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = vars(liger._load()) | {name: lambda *given: spoil(getattr(liger_before, name)(*given))}
    liger_before = liger._load()
    monkeypatch.setattr(liger, "_load", lambda: liger._Functions(**functions))
    assert "differs from plain operations by" in str(explain_liger_absence(CPU, torch.float32))


def spoil(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Right numbers, and half of the gradient."""
    halve = lambda x: 0.5 * x + (0.5 * x).detach()  # noqa: E731
    return halve(outputs) if isinstance(outputs, torch.Tensor) else tuple(halve(x) for x in outputs)


def test_without_the_package_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    assert "install polm[gpu]" in str(explain_liger_absence(CPU, torch.float32))


class Broken(Exception):
    """Triton's errors are no RuntimeErrors."""


@pytest.mark.usefixtures("stand_ins")
def test_errors_of_the_compiler_are_reasons_and_a_full_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> liger._Functions:
        raise error

    monkeypatch.setattr(liger, "_load", lambda: fail(Broken("no compiler\nmore")))
    assert explain_liger_absence(CPU, torch.float32) == "does not run here: Broken: no compiler"
    explain_liger_absence.cache_clear()
    monkeypatch.setattr(liger, "_load", lambda: fail(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        explain_liger_absence(CPU, torch.float32)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLM_KERNELS", "off")
    assert explain_liger_absence(CPU, torch.float32) == "POLM_KERNELS is off"


INTERPRETED = """
import numpy as np, torch, triton, triton.language as tl
from triton.runtime import interpreter

# What Triton's interpreter lacks: numbers as arguments, and the device library's square root.
convert = interpreter._implicit_cvt

def convert_numbers(given):
    if not isinstance(given, float):
        return convert(given)
    return tl.tensor(interpreter.TensorHandle(np.array([given], dtype=np.float32), tl.float32), tl.float32)

interpreter._implicit_cvt = convert_numbers
import liger_kernel.ops.rms_norm as norms

@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)

norms.rsqrt = rsqrt
from polm.models.kernels import liger
liger.MANY_ROWS = 64  # as many as it takes are too many for an interpreter
print(liger._measure(torch.device("cpu"), torch.float32))
"""


@needs_triton
def test_the_kernels_in_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert run.returncode == 0, run.stderr
    assert 0.0 < float(run.stdout.strip().splitlines()[-1]) < 1e-5
