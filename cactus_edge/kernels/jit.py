"""How functions are compiled: all options of Numba, in one place.

Only the function that Python calls is cached on disk. Numba notices a change in the file of a
cached function but none in the functions that it calls, so its key also holds ``source_digest``:
an edited kernel, or an edited line of ``semantics``, can never run from an old cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

_log = logging.getLogger(__name__)

Compiled = TypeVar("Compiled", bound=Callable[..., object])


def kernel(function: Compiled) -> Compiled:
    """Compile a function that only compiled code calls."""
    return _compile(function)


def inlined(function: Compiled) -> Compiled:
    """Compile a kernel that is part of every caller.

    For what runs once for an output: passing its many array arguments costs more than what it
    computes.
    """
    return _compile(function, inline=True)


def entry(function: Compiled) -> Compiled:
    """Compile a function that Python calls; it runs without the interpreter's lock."""
    try:
        return _compile(function, python=True, cache=True)
    except RuntimeError as error:  # no folder that can be written
        _log.warning("compiled kernels are not cached, each process compiles them: %s", error)
        return _compile(function, python=True)


def _compile(
    function: Compiled, *, python: bool = False, cache: bool = False, inline: bool = False
) -> Compiled:
    return numba.njit(  # pyright: ignore
        nogil=True,
        cache=cache,
        forceinline=inline,
        # No test for division by zero: every divisor is the size of a window.
        error_model="numpy",
        # Kernels allocate nothing, and to count references to their views, atomically, takes longer
        # than many of the loops. A kernel that allocates or returns an array does not compile.
        _nrt=python,
        # What Python and C never call needs no entry for them; the whole compiles in three quarters
        # of the time.
        no_cpython_wrapper=not python,
        no_cfunc_wrapper=not python,
    )(function)


def _pointer(typing_context: object, address: types.Type) -> tuple[object, Callable[..., object]]:
    """The address, an int64, as an untyped pointer for ``numba.carray``."""

    def generate(
        context: object, builder: ir.IRBuilder, signature: object, arguments: list[ir.Value]
    ) -> object:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


pointer: Callable[[int], ctypes.c_void_p] = intrinsic(_pointer)  # pyright: ignore


def register(module: ModuleType) -> None:
    """Let compiled code call the functions of a plain module, always inlined.

    Without inlining at every level, loops over the longer roundings are not vectorised.
    """
    for function in vars(module).values():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            register_jitable(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
                function
            )


def source_digest(*modules: ModuleType) -> int:
    """A 60-bit digest of these modules and of every module in this folder and below."""
    files = [Path(str(module.__file__)) for module in modules]
    files += sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return int(digest.hexdigest()[:15], 16)
