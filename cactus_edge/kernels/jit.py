"""How functions are compiled: all options of Numba, in one place.

Only the function that Python calls is cached on disk. Numba notices a change in the file of a
cached function but none in the functions that it calls, so its key also holds ``source_digest``:
an edited kernel, or an edited line of ``semantics``, can never run from an old cache. What is read
back is checked against a digest of its own: Numba hands a damaged file to LLVM, which ends the
process or, worse, runs other code.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import llvmlite
import numba
from llvmlite import ir
from numba import types
from numba.core.caching import IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.extending import intrinsic, register_jitable

from cactus_edge.errors import UsageError

_log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256().digest_size

Compiled = TypeVar("Compiled", bound=Callable[..., object])


def kernel(function: Compiled) -> Compiled:
    """Compile a function that only compiled code calls.

    Machine code of several entries is linked by name where it comes from the cache: module, name,
    types of the arguments, and a number that each process counts anew. So a kernel that is made
    for a function has that one's name in its own; else another's could be called in its place.
    """
    for cell in function.__closure__ or ():  # pyright: ignore[reportFunctionMemberAccess]
        function.__qualname__ += f".{cell.cell_contents.__qualname__}"
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
        compiled: Any = _compile(function, python=True, cache=True)
    except RuntimeError as error:  # no folder that can be written
        _log.warning("compiled kernels are not cached, each process compiles them: %s", error)
        return _compile(function, python=True)
    cache = compiled._cache
    cache._cache_file = _CheckedFiles(cache._cache_file)
    cache.load_overload = partial(_load, cache)
    return _optimized_once(compiled)


def _load(cache: Any, signature: object, context: object) -> object:
    """Read back what was compiled, if it was.

    Numba's own method first sets up all that compiling may need. Kernels that exist need its
    runtime alone, and compiling sets up the rest by itself.
    """
    rtsys.initialize(context)
    return cache._load_overload(signature, context)


def _optimized_once(compiled: Any) -> Any:
    """Let LLVM optimize an entry with all that it calls, and not every kernel before as well.

    Numba optimizes and translates each function together with all that is below it, so that the
    lowest of seven levels is optimized seven times; half of the time went there.
    """
    compile_signature = compiled.compile

    def compile_whole(signature: object) -> object:
        with _whole(compiled.py_func.__qualname__):
            return compile_signature(signature)

    compiled.compile = compile_whole
    return compiled


@contextmanager
def _whole(name: str) -> Generator[None]:
    """What is compiled here, other than the entry, is only linked into others."""

    class Part(_Part):
        entry_name = name

    codegen: Any = cpu_target.target_context.codegen()  # pyright: ignore
    with global_compiler_lock:
        codegen._library_class = Part
        try:
            yield
        finally:
            del codegen._library_class  # that of the class shows again


class _Part(JITCodeLibrary):
    """Code of one function: machine code if it is the entry, else only what others link.

    Nothing else can be called from Python, which holds for kernels: they have no wrapper.
    """

    entry_name = ""

    @property
    def codegen(self) -> Any:
        """Numba writes to a variable of the machine code, where there is some."""
        return self._codegen if self.name == self.entry_name else _NoVariables(self._codegen)

    def _optimize_final_module(self) -> None:
        if self.name == self.entry_name:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        if self.name == self.entry_name:
            super()._finalize_final_module()
        else:
            self._finalize_dynamic_globals()
            self._finalized = True


class _NoVariables:
    """A code generator that does not look for what a part does not have."""

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)

    def set_env(self, env_name: str, env: object) -> None:
        """Leave the environment alone: kernels raise nothing and read no globals of Python."""


class _CheckedFiles(IndexDataCacheFile):
    """Where Numba keeps a function: a file for each signature and CPU, before its own SHA-256.

    There is no index, which two processes that compile for different tiers could both write.
    """

    def __init__(self, numbas: Any) -> None:
        """In the same folder as Numba's own files, ``numbas``."""
        base = Path(numbas._index_path).with_suffix("")
        super().__init__(str(base.parent), base.name, numbas._source_stamp)
        self._origin = (numba.__version__, llvmlite.__version__, numbas._source_stamp)

    def _file(self, key: Sequence[object]) -> Path:
        # Types are pickled with numbers that are not the same in another process.
        signature, *others = key
        text = repr((str(signature), others, self._origin))
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return Path(self._data_path(f"{Path(self._index_name).stem}.{name}.nbc"))

    def load(self, key: Sequence[object]) -> object:
        """What was saved under a key; None if there is nothing or it is damaged."""
        file = self._file(key)
        try:
            content = file.read_bytes()
            data, digest = content[:-_DIGEST], content[-_DIGEST:]
            if hashlib.sha256(data).digest() == digest:
                return self._load_data(file.name)
        except OSError:
            return None
        _log.warning("%s is damaged, its kernels are compiled again", file)
        return None

    def save(self, key: Sequence[object], data: object) -> None:
        """Keep what Numba can write down, for this key alone."""
        try:
            self._save_data(self._file(key).name, data)
        except OSError as error:
            _log.warning("compiled kernels are not cached: %s", error)

    def _dump(self, obj: object) -> bytes:
        # Numba reads up to the end of what it wrote, so the digest may stand behind it.
        content = super()._dump(obj)
        return content + hashlib.sha256(content).digest()

    def flush(self) -> None:
        """Files of other keys are never read, so there is nothing to forget."""


def _compile(
    function: Compiled, *, python: bool = False, cache: bool = False, inline: bool = False
) -> Compiled:
    if numba.config.DISABLE_JIT:  # pyright: ignore
        raise UsageError("NUMBA_DISABLE_JIT is set, but the kernels exist as compiled code alone")
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
