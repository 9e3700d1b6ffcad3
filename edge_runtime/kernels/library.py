"""The compiled core: which build this machine can run, and how its functions are called.

`open_library` gives the best build that is there, or None, and then `why_not` says why. $NESTLING_ISA names one instruction
set to use instead of the best (``none``: no build at all, so that the twin does the work).

The structures and signatures here are those of `native/kernels.h`, word for word; a test compares them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_float, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edge_runtime.kernels import compile as source
from wire.errors import DeviceError

ABI = 3
THREADS_MAX = 64
AGAIN = "python -m edge_runtime.kernels.compile"
"""The command that mends every reason of `why_not`."""
FOREIGN = 3
CODES = {
    1: "its shape is not one that a kernel can run",
    2: "the starts of its rows are out of order",
    FOREIGN: "an index lies outside its block, or a label is no class",
    4: "there is no memory for its scratch",
}


class Image(ctypes.Structure):
    """Rows of an activation: ``[channels][height + 2 halo][width + 2 halo]``."""

    _fields_: ClassVar = [(name, c_int32) for name in ("channels", "height", "width", "halo")]


class Step(ctypes.Structure):
    """`nk_update`: how values move along a gradient. The pointers are null where not needed."""

    _fields_: ClassVar = [
        *((name, c_float) for name in ("rate", "momentum", "decay", "pull")),
        *((name, c_void_p) for name in ("velocity", "anchor")),
    ]


class Linear(ctypes.Structure):
    """`nk_linear`: a sparse matrix in blocks of columns."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("rows", "columns", "block", "blocks", "index_bytes", "kept")),
        *((name, c_void_p) for name in ("starts", "index")),
    ]


class Conv(ctypes.Structure):
    """`nk_conv`: a sparse convolution in blocks of channels."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("out_channels", "in_channels", "kernel", "stride", "padding", "dilation")),
        *((name, c_int32) for name in ("in_block", "in_blocks", "out_block", "out_blocks", "kept")),
        *((name, c_void_p) for name in ("starts", "codes", "starts_t", "codes_t", "places")),
    ]


class Call(ctypes.Structure):
    """`nk_call`: one call of a list that `nk_run` runs."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("what", "batch", "size", "relu")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("layer", "first", "second", "third", "update", *"abcdefg")),
    ]


class Window(ctypes.Structure):
    """`nk_window`: windows that slide over planes of activations as torch lays them out."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("channels", "held", "height", "width", "out_height", "out_width")),
        *((name, c_int32) for name in ("kernel_y", "kernel_x", "stride_y", "stride_x", "pad_y", "pad_x")),
    ]


class Norm(ctypes.Structure):
    """`nk_norm`: values of which every channel, or every group of a sample, has statistics of its own."""

    _fields_: ClassVar = [(name, c_int32) for name in ("samples", "channels", "inner", "groups")]


_IMAGE, _STEP, _LINEAR, _CONV = POINTER(Image), POINTER(Step), POINTER(Linear), POINTER(Conv)
_WINDOW = POINTER(Window)
_NORM = POINTER(Norm)
_CALL = POINTER(Call)
_P, _I = c_void_p, c_int32  # any array, by address; None is null
CALLS: dict[str, tuple[Any, ...]] = {
    "nk_abi": (),
    "nk_lanes": (),
    "nk_threads": (_I,),
    "nk_pack": (_IMAGE, _I, _P, _P),
    "nk_unpack": (_IMAGE, _I, _P, _P),
    "nk_linear_check": (_LINEAR,),
    "nk_linear_forward": (_LINEAR, _P, _P, _P, _I, _I, _P),
    "nk_linear_backward": (_LINEAR, _P, _P, _P, _P, _I, _P, _P, _P, _STEP),
    "nk_pool_forward": (_IMAGE, _I, _I, _I, _P, _IMAGE, _P, _P),
    "nk_pool_backward": (_IMAGE, _I, _I, _I, _P, _IMAGE, _P, _P, _IMAGE, _P, _P),
    "nk_conv_pool_forward": (_CONV, _P, _P, _IMAGE, _P, _I, _IMAGE, _I, _I, _IMAGE, _P, _P),
    "nk_conv_pool_backward": (_CONV, _P, _IMAGE, _P, _I, _IMAGE, _I, _I, _IMAGE, _P, _P, _P, _P, _P, _STEP),
    "nk_linear_lay": (_LINEAR, _P, _I),
    "nk_conv_lay": (_CONV, _P, _I),
    "nk_reorder": (_P, _I, _I, _I, _P, _P, _I),
    "nk_cross_entropy": (_P, _I, _I, _P, c_float, _P, _P),
    "nk_settle": (_P, _I, _P, _STEP),
    "nk_run": (_CALL, _I),
    "nk_conv_check": (_CONV,),
    "nk_conv_forward": (_CONV, _P, _P, _IMAGE, _P, _I, _I, _P),
    "nk_conv_backward_input": (_CONV, _P, _IMAGE, _IMAGE, _P, _I, _P),
    "nk_conv_backward_weight": (_CONV, _P, _IMAGE, _P, _IMAGE, _P, _I, _P, _STEP),
    "nk_window_take": (_WINDOW, _I, _P, _P),
    "nk_window_give": (_WINDOW, _I, _P, _P),
    "nk_depth_forward": (_WINDOW, _I, _P, _P, _P, _P, _P, _I),
    "nk_depth_backward": (_WINDOW, _I, _P, _P, _P, _P, _P, _P, _P, _I),
    "nk_dense_forward": (_WINDOW, _I, _I, _I, _P, _P, _P, _P, _P, _I),
    "nk_dense_backward": (_WINDOW, _I, _I, _I, _P, _P, _P, _P, _P, _P, _P, _I),
    "nk_most_forward": (_WINDOW, _I, _P, _P, _P),
    "nk_most_backward": (_WINDOW, _I, _P, _P, _P),
    "nk_mean_forward": (_WINDOW, _I, _I, _P, _P),
    "nk_mean_backward": (_WINDOW, _I, _I, _P, _P),
    "nk_norm_forward": (_NORM, _P, _P, _P, c_float, _P, _P, _P, _P, _P),
    "nk_norm_fixed": (_NORM, _P, _P, _P, _P, _P, _P),
    "nk_norm_backward": (_NORM, _P, _P, _P, _P, _P, _P, _I, _P, _P),
    "nk_lstm_forward": (_I, _I, _P, _P, _P, _P, _P, _P, _I, _P, _I),
    "nk_lstm_backward": (_I, _I, _P, _I, _P, _P, _P, _P, _I, _P),
    "nk_gru_forward": (_I, _I, _P, _P, _P, _P, _P, _P, _I, _P, _I, _P, _I),
    "nk_gru_backward": (_I, _I, _P, _I, _P, _P, _I, _P, _I, _P, _I, _P, _P),
}
"""Function to the types of its arguments; each gives an int32. Structures are passed with `ctypes.byref`."""


@dataclass(frozen=True, slots=True)
class Library:
    """One opened build. It stays open as long as the process lives: its threads run in it.

    Attributes:
        path: The file.
        isa: ``avx512``, ``avx2``, ``sse2`` or ``neon``.
        lanes: Floats in one of its vectors.
        calls: Its functions, as in `CALLS`.
    """

    path: Path
    isa: str
    lanes: int
    calls: ctypes.CDLL

    def threads(self, count: int) -> None:
        """Set the threads of all later calls, the caller's among them; they are started when first needed.

        Raises:
            DeviceError: Not one of 1 to `THREADS_MAX`.
        """
        must(self.calls.nk_threads(count), f"{count} threads")


def must(code: int, what: str) -> None:
    """Turn what a function gave into an error unless it is 0.

    Raises:
        DeviceError: Naming `what` and the reason.
    """
    if code:
        raise DeviceError(f"{what}: {CODES.get(code, f'the compiled core gave {code}')}")


def open_library() -> Library | None:
    """Open the best build for this machine, once per process; None where there is none."""
    return _opened()[0]


def why_not() -> str:
    """Say why `open_library` gives None; empty if it gives a library."""
    return _opened()[1]


@functools.cache
def _opened() -> tuple[Library | None, str]:
    return look(source.NATIVE, os.environ.get("NESTLING_ISA", ""))


def look(folder: Path, wanted: str = "") -> tuple[Library | None, str]:
    """Open the best build in a folder, or say why there is none.

    Args:
        folder: Where the builds are.
        wanted: One instruction set, ``none``, or empty for the best.
    """
    if wanted == "none":
        return None, "NESTLING_ISA=none asks for none"
    if wanted and wanted not in source.ORDER:
        return None, f"NESTLING_ISA={wanted} is none of {', '.join(source.ORDER)}"
    why = []
    for isa in (wanted,) if wanted else source.ORDER:
        path = folder / source.name(isa)
        found = _try(path, isa)
        if isinstance(found, Library):
            return found, ""
        if found:
            why.append(f"{path.name}: {found}")
    return None, "; ".join(why) or f"not compiled ({source.name(wanted or '*')} is not in {folder})"


def _try(path: Path, isa: str) -> Library | str:
    """Open one build, or say why not; empty if it is not there."""
    try:
        if source.mark(source.digest()) not in path.read_bytes():
            return "built from other sources than are here"
        calls = ctypes.CDLL(str(path))
        # Checked before any other function runs: this one is compiled for the oldest processor.
        if not calls.nk_runs_here():
            return f"this processor (or its system) has no {isa}"
        if (abi := calls.nk_abi()) != ABI:
            return f"speaks version {abi} of the interface, this program {ABI}"
        for name, types in CALLS.items():
            function = getattr(calls, name)
            function.argtypes, function.restype = types, c_int32
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, AttributeError) as error:
        return f"cannot be opened: {error}"
    return Library(path, isa, calls.nk_lanes(), calls)
