"""How threads divide one run of a program: steps are cut into parts, and threads claim parts.

The thread that Python calls leads; the others help. Nobody waits for a thread that has not come:
whoever is there takes the next part, and a step is complete when all its parts are. So a helper
that sleeps, or that the system has put aside, costs its share of speed and nothing else.

A *generation* is one run. Claims and completed parts are counted in words that only grow and that
the generation is part of, so a helper that comes late finds nothing to claim, whatever it believed
the generation to be, and nothing has to be reset between runs.

All of a team's words lie in one array of int64, each that is written on a cache line of its own:
the generation, the parked flags, the job, parts for each step, then for each step the parts that
are done and the claims of each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cactus_edge.kernels.jit import kernel

_LINE = 8
GENERATION = 0
"""Word of the last run that was begun; ``STOP`` sends the helpers away."""
STOP = -1
_MEMBERS = _LINE
_POLLS = _LINE + 1
_IMAGES = 2 * _LINE
_HEADER = 3 * _LINE

# Claims of a generation are fewer than this.
_CLAIMS = 1 << 20

_Words = npt.NDArray[np.int64]


def words(parts: Sequence[int], members: int) -> _Words:
    """A team's memory, int64, for so many threads.

    Args:
        parts: into how many each step is cut; 1 for what the leader does alone.
        members: threads, the leader included.
    """
    steps = len(parts)
    size = _HEADER + _LINE * (members + -(-steps // _LINE) + steps * (members + 1))
    memory = np.zeros(size + _LINE, np.int64)
    begin = -memory.ctypes.data % (8 * _LINE) // 8
    team = memory[begin : begin + size]
    team[_MEMBERS] = members
    first = _HEADER + _LINE * members
    team[first : first + len(parts)] = parts
    return team


def parked(member: int) -> int:
    """The word that a helper sets to 1 before it sleeps, and the leader to 0 to wake it."""
    return _HEADER + _LINE * member


def set_polls(team: _Words, polls: int) -> None:
    """How often a helper looks for work before it parks."""
    team[_POLLS] = polls


# ---------------------------------------------------------------------- atomic instructions
def _atomic(function: Callable[..., object]) -> Any:
    """A function of compiled code from one that gives its signature and emits it."""
    return intrinsic(function)


def _word(builder: ir.IRBuilder, address: ir.Value) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


def _load(typing_context: object, address: types.Type) -> object:
    def generate(context: object, builder: Any, signature: object, values: Sequence[Any]) -> object:
        return builder.load_atomic(_word(builder, values[0]), "acquire", 8)

    return types.int64(types.int64), generate


def _store(typing_context: object, address: types.Type, value: types.Type) -> object:
    def generate(context: Any, builder: Any, signature: object, values: Sequence[Any]) -> object:
        builder.store_atomic(values[1], _word(builder, values[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _add(typing_context: object, address: types.Type, value: types.Type) -> object:
    def generate(context: object, builder: Any, signature: object, values: Sequence[Any]) -> object:
        return builder.atomic_rmw("add", _word(builder, values[0]), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


def _replace(
    typing_context: object, address: types.Type, expected: types.Type, value: types.Type
) -> object:
    def generate(context: object, builder: Any, signature: object, values: Sequence[Any]) -> object:
        word = _word(builder, values[0])
        result = builder.cmpxchg(word, values[1], values[2], "seq_cst", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


def _pause(typing_context: object) -> object:
    """Tell the CPU that this is a loop that waits."""

    def generate(context: Any, builder: Any, signature: object, values: object) -> object:
        none = ir.VoidType()
        if builder.module.triple.startswith(("x86", "i386", "i686", "amd64")):
            function = builder.module.declare_intrinsic(
                "llvm.x86.sse2.pause", (), ir.FunctionType(none, ())
            )
            builder.call(function, ())
        elif builder.module.triple.startswith(("aarch64", "arm64")):
            hint = ir.FunctionType(none, (ir.IntType(32),))
            function = builder.module.declare_intrinsic("llvm.aarch64.hint", (), hint)
            builder.call(function, (ir.IntType(32)(1),))
        return context.get_dummy_value()

    return types.void(), generate


load: Callable[[int], int] = _atomic(_load)
"""The word at an address, before anything that follows."""
store: Callable[[int, int], None] = _atomic(_store)
"""Write the word at an address, after everything that came before."""
add: Callable[[int, int], int] = _atomic(_add)
"""Add to the word at an address; gives what it was."""
replace: Callable[[int, int, int], bool] = _atomic(_replace)
"""Change the word at an address if it is what was expected."""
pause: Callable[[], None] = _atomic(_pause)


# ---------------------------------------------------------------------- runs
@kernel
def begin(team: int, images: int) -> int:
    """The leader begins a run; gives its generation."""
    store(team + 8 * _IMAGES, images)
    return add(team + 8 * GENERATION, 1) + 1


@kernel
def await_run(team: int, member: int, seen: int) -> int:
    """A helper waits for a generation other than the one it has seen.

    Returns:
        the generation; ``STOP`` to leave, either for good or to sleep until the leader wakes it.
    """
    for _ in range(load(team + 8 * _POLLS)):
        generation = load(team + 8 * GENERATION)
        if generation != seen:
            return generation
        pause()
    store(team + 8 * (_HEADER + _LINE * member), 1)
    return STOP


@kernel
def images_of(team: int) -> int:
    """Images of the run."""
    return load(team + 8 * _IMAGES)


@kernel
def parts_of(team: int, step: int) -> int:
    """Into how many parts a step is cut."""
    return load(team + 8 * (_HEADER + _LINE * load(team + 8 * _MEMBERS) + step))


@kernel
def _counters(team: int, steps: int, step: int) -> int:
    """Address of a step's words: the parts that are done, then each thread's claims."""
    members = load(team + 8 * _MEMBERS)
    line = members + -(-steps // _LINE) + step * (members + 1)
    return team + 8 * (_HEADER + _LINE * line)


@kernel
def claim(team: int, steps: int, step: int, member: int, generation: int) -> int:
    """A part of a step for this thread alone: of its own range, then of the others'; -1 if none."""
    members = load(team + 8 * _MEMBERS)
    parts = parts_of(team, step)
    words = _counters(team, steps, step)
    base = generation * _CLAIMS
    for turn in range(members):
        owner = (member + turn) % members
        first, last = parts * owner // members, parts * (owner + 1) // members
        word = words + 8 * _LINE * (owner + 1)
        while True:
            claims = load(word)
            # Of a later generation there are more than parts: this thread came too late.
            claimed = max(claims - base, 0)
            if first + claimed >= last:
                break
            if replace(word, claims, base + claimed + 1):
                return first + claimed
    return -1


@kernel
def complete(team: int, steps: int, step: int, parts: int) -> None:
    """Report parts of a step as done."""
    if parts > 0:
        add(_counters(team, steps, step), parts)


@kernel
def await_step(team: int, steps: int, step: int, generation: int) -> None:
    """Wait until all parts of a step are done."""
    target = generation * parts_of(team, step)
    word = _counters(team, steps, step)
    while load(word) < target:
        pause()
