"""CPU kernels in C++: compiled for several instruction sets when shoal is installed, the best one loaded at run time.

The interface is plain C through ctypes, so a build fits every version of torch and Python.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "avx512_vnni": (
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"],
        ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"],
    ),
    "avx512": (
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
        ["avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"],
    ),
    "avx2": (["-mavx2", "-mfma"], ["avx2", "fma"]),
}
"""Compiler flags, and what /proc/cpuinfo must list; best first."""

COMPILER_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=off", "-pthread"]
"""No contraction: which products and sums are fused is written in the source, or rows would differ by batch size."""


def library_path(variant: str) -> Path:
    return Path(__file__).parent / f"kernels_{variant}.so"


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())


def variants() -> list[str]:
    """Those that are built and that this CPU runs, best first."""
    flags = _cpu_flags()
    return [name for name, (_, needs) in VARIANTS.items() if flags.issuperset(needs) and library_path(name).exists()]


def unavailable_reason() -> str | None:
    """Why the native kernels cannot be used here, with what to do about it; None if they can."""
    if variants():
        return None
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"native CPU kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if not _cpu_flags().issuperset(VARIANTS["avx2"][1]):
        return "this CPU has no AVX2, which the native kernels need"
    return "the native CPU kernels were not built: install a C++ compiler (g++) and install shoal again"


class Packed(ctypes.Structure):
    """As `struct Packed` in linear.h."""

    _fields_ = [  # noqa: RUF012  (ctypes reads it as it stands)
        ("precision", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("gated", ctypes.c_int),
        ("panels", ctypes.c_int),
        ("k_padded", ctypes.c_int),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class AttentionCall(ctypes.Structure):
    """As `struct Attention` in attention.h."""

    _fields_ = [  # noqa: RUF012
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("unseen", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("block_size", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("kv_bfloat16", ctypes.c_int),
        ("table_length", ctypes.c_int),
        ("group", ctypes.c_int),
        ("skipped", ctypes.c_int),
    ]


_SIGNATURES = {  # p pointer, s string, i int, l int64, f float, d double; result first, - for none
    "shoal_pool_create": "pi",
    "shoal_pool_destroy": "-p",
    "shoal_allocate": "pl",
    "shoal_free": "-pl",
    "shoal_size_of_packed": "i",
    "shoal_size_of_attention": "i",
    "shoal_panel_width": "i",
    "shoal_group": "i",
    "shoal_weight_bytes": "lp",
    "shoal_pack": "ipppliii",
    "shoal_linear": "ippplii" + "pl",
    "shoal_embedding": "ipppipl",
    "shoal_rms_norm": "ipplpfpii",
    "shoal_add_rms_norm": "ipp" + "ppfpii",
    "shoal_rope": "ipplppiiiiippf",
    "shoal_write_kv": "ippppplpliiiii",
    "shoal_attention": "ippii",
    "shoal_argmax": "ipplii" + "p",
    "shoal_draw": "ipplii" + "pppp",
    "shoal_comm_create": "isll",
    "shoal_comm_attach": "psiid" + "pl",
    "shoal_comm_close": "-p",
    "shoal_comm_abort": "-p",
    "shoal_comm_abort_path": "ispl",
    "shoal_comm_all_reduce": "ippli",
    "shoal_comm_all_gather": "ipplp",
    "shoal_comm_reduce_scatter": "ipplip",
    "shoal_comm_broadcast": "ippli",
    "shoal_comm_all_to_all": "ippppp",
    "shoal_comm_send": "ippli",
    "shoal_comm_receive": "ippli",
}
_TYPES = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
    "-": None,
}


@cache
def load_library(variant: str) -> ctypes.CDLL:
    """The kernels built for one instruction set. Raises OSError if the file is not there."""
    library = ctypes.CDLL(str(library_path(variant)))
    for name, codes in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = _TYPES[codes[0]]
        function.argtypes = [_TYPES[code] for code in codes[1:]]
    return library
