"""Build the kernels (the `.cpp` files here) on first use and open them; without a compiler there are none.

The library is kept in the user's cache folder under the hash of its source, the compiler and the processor, and put
there whole, so that several processes may build at once. POLM_KERNELS=off does without it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SWITCH = "POLM_KERNELS"
SOURCES = ("rows.cpp", "attention.cpp", "decode.cpp")
HEADERS = ("pairs.h",)
# No -ffast-math: numbers that are not finite must stay so, for the loop to see them.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-shared", "-fPIC"),
)
WIDE_FLAG = "-mprefer-vector-width=512"
TIME_LIMIT = 300.0  # seconds that a compiler may take

P, F, I, N = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64  # noqa: E741
SIGNATURES: dict[str, tuple[type, ...]] = {
    "polm_norm_forward": (P, P, F, P, P, N, N, I, I),
    "polm_norm_backward": (P, P, P, P, P, P, N, N, I, I),
    "polm_rotate_forward": (P, P, F, P, P, P, P, N, N, N, I, I),
    "polm_rotate_backward": (P, P, P, P, P, P, P, P, N, N, N, I, I),
    "polm_swiglu_forward": (P, P, P, N, I, I),
    "polm_swiglu_backward": (P, P, P, P, P, N, I, I),
    "polm_head_forward": (P, P, F, P, P, P, N, N, N, I, I),
    "polm_head_backward": (P, P, F, P, P, P, P, N, N, N, I, I),
    "polm_head_gradient": (P, P, F, P, P, N, N, N, I, I),
}
# Only where the processor multiplies pairs of bfloat16.
PAIR_SIGNATURES: dict[str, tuple[type, ...]] = {
    "polm_attention_forward": (*(P,) * 8, *(N,) * 5, F, I),
    "polm_attention_backward": (*(P,) * 13, *(N,) * 5, F, I),
    "polm_few_rows": (*(P,) * 4, *(N,) * 3, I, I),
    "polm_decode_attention": (*(P,) * 7, *(N,) * 6, F, I),
    "polm_decode_layers": (*(P,) * 6, *(N,) * 8, F, F, I),
}


def explain_switch() -> str | None:
    """Why no kernel may be taken, on any device: the user's switch. None where it is not set."""
    is_off = os.environ.get(SWITCH, "").lower() in ("off", "0", "false", "no")
    return f"{SWITCH} is {os.environ[SWITCH]}" if is_off else None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are switched off or cannot be built (`explain_absence` says why)."""
    library = _find_library()
    if isinstance(library, str):
        return None
    signatures = SIGNATURES | (PAIR_SIGNATURES if library.polm_has_pairs() else {})
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


@functools.cache
def has_pairs() -> bool:
    """Whether the library holds the kernels of `attention.cpp` and `decode.cpp`: on processors with AVX512-BF16 and
    without AMX."""
    library = load_library()
    return library is not None and bool(library.polm_has_pairs())


def explain_absence() -> str | None:
    """Why there are no kernels; None where there are."""
    found = _find_library()
    return found if isinstance(found, str) else None


def describe_kernels() -> str:
    """For a run's record: what the row kernels were, since bits in bf16 depend on them."""
    return "off" if load_library() is None else _hash_of((*SOURCES, *HEADERS))[:12]


@functools.cache
def _find_library() -> ctypes.CDLL | str:
    if (off := explain_switch()) is not None:
        return off
    compiler = shutil.which(os.environ.get("CXX", "") or "g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler (g++ or c++, or the one that CXX names) is on the path"
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not build them: {(error.stderr or '').strip()[:400]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"they could not be built: {error}"


def _build(compiler: str) -> Path:
    """The path of the library, compiled if it is not in the cache."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    flags = (*FLAGS, WIDE_FLAG) if platform.machine() in ("x86_64", "AMD64") else FLAGS
    about = "\n".join((version.stdout, " ".join(flags), _describe_processor()))
    name = hashlib.sha256((_hash_of((*SOURCES, *HEADERS)) + about).encode()).hexdigest()[:16]
    library = _cache_folder() / f"rows-{name}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        sources = [str(Path(__file__).parent / source) for source in SOURCES]
        command = [compiler, *flags, *sources, "-o", str(partial)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
        partial.replace(library)
    return library


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polm"


def _hash_of(sources: tuple[str, ...]) -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / source).read_bytes() for source in sources)).hexdigest()


def _describe_processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "model name", "Features", "CPU part")
    facts = {line.partition(":")[0].strip(): line for line in lines}
    return "\n".join(facts[name] for name in wanted if name in facts)
