"""Whether a kernel gives the numbers of plain operations on the device at hand: asked once, before it is relied on.

A kernel that fails or is wrong there is a reason to go on without it, not to stop or to train on wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Largest difference that rounding explains, as a share of the largest number. What is wrong is off by tenths.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}

_found: dict[str, None] = {}  # in the order in which kernels were tried


def describe_proofs() -> str:
    """For a run's record: which kernels of a GPU were tried, and what was found. Empty where none was."""
    return "; ".join(_found)


def note(name: str, absence: str | None) -> str | None:
    """Remember what was found of a kernel; returns `absence`."""
    _found[f"{name}: {absence or 'in use'}"] = None
    return absence


def explain_gap(name: str, measure: Callable[[], float], dtype: torch.dtype) -> str | None:
    """Why the kernel `name` is not to be used, from its gap to plain operations; None where it is.

    Raises OutOfMemoryError: it says nothing of the kernel.
    """
    try:
        gap = measure()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (compilers of kernels have exceptions of their own)
        return note(name, f"does not run here: {describe(error)}")
    within = gap <= TOLERANCE.get(dtype, min(TOLERANCE.values()))
    return note(name, None if within else f"differs from plain operations by {gap:.1g}")


def describe(error: Exception) -> str:
    """Its kind and the beginning of what it says, on a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class WaitingOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in `asked` the operations for which the host waits for a device: those that hand it a number, and those
    whose result has a size that only the device knows. (Copies from the host to a device are not seen.)"""

    # On a GPU it asks for the smallest and the largest bin, which its tags do not say.
    MORE = ("bincount",)

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func.overloadpacket is torch.ops.aten.index:  # by places it waits for nothing
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if waits or func.overloadpacket.__name__ in self.MORE:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def measure_gap(kernel: Callable[..., Any], plain: Callable[..., Any], given: Sequence[Tensor]) -> float:
    """Largest difference of the outputs, with and without gradients enabled, and of the gradients; NaN where any is.

    `kernel` and `plain` take the tensors `given` and return one or several.
    """
    with torch.autocast(given[0].device.type, enabled=False):  # it is asked in the middle of a forward pass
        found, expected = _differentiate(kernel, given), _differentiate(plain, given)
        with torch.no_grad():
            found += _as_list(kernel(*(x.clone() for x in given)))
    with torch.no_grad():
        expected += expected[: len(found) - len(expected)]
        pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
        gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs]
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def _differentiate(function: Callable[..., Any], given: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of a fixed random combination of them for each of `given`."""
    inputs = [x.clone().requires_grad_() for x in given]
    generator = torch.Generator().manual_seed(1)
    # Activation checkpointing counts what is saved in the layer that asked; these tensors are none of it.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
        # Copies go in: some kernels write into what they are given.
        outputs = _as_list(function(*(x.clone() for x in inputs)))
        values = [out.detach().clone() for out in outputs]
        total = inputs[0].new_zeros((), dtype=torch.float32)
        for out in outputs:
            total = total + (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).sum()
        return [*values, *torch.autograd.grad(total, inputs)]


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _keep(tensor: Tensor) -> Tensor:
    return tensor
