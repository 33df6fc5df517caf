"""A tier as an argument of compiled functions: its Numba type chooses the code at compile time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import (
    NativeValue,
    intrinsic,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from cactus_edge.kernels.simd.emit import Emitter, Value
from cactus_edge.kernels.simd.tiers import Tier


@dataclass(frozen=True)
class Tag:
    """Passed to compiled code in the place of its tier."""

    tier: Tier


class TierType(types.Opaque):
    """Numba's type of a ``Tag``; functions are compiled and cached once for each."""

    def __init__(self, tier: str) -> None:
        """Name the type after the tier."""
        self.tier = Tier(tier)
        super().__init__(name=f"Tier({tier})")


register_model(TierType)(models.OpaqueModel)


@typeof_impl.register(Tag)
def _typeof(value: Tag, _: object) -> TierType:
    return TierType(value.tier)


@unbox(TierType)
def _unbox(typ: object, obj: object, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


Emission = Callable[..., Value | None]


def emitted(arguments: int, *, returns: bool = False) -> Callable[[Emission], Any]:
    """Make a function of compiled code from one that emits IR.

    The function takes a tag and ``arguments`` int64; ``emission(emitter, *values)`` emits its body.
    For ``Tier.PLAIN`` it must never be called, and is empty.
    """

    def decorate(emission: Emission) -> Any:
        def typed(context: object, tag: TierType, *given: object) -> object:
            result = types.int64 if returns else types.void
            signature = result(tag, *[types.int64] * arguments)

            def generate(
                context: Any, builder: ir.IRBuilder, signature: object, values: list[Value]
            ) -> object:
                result = None
                if tag.tier is not Tier.PLAIN:
                    result = emission(Emitter(builder, tag.tier), *values[1:])
                if returns:
                    return ir.IntType(64)(0) if result is None else result
                return context.get_dummy_value()

            return signature, generate

        names = ", ".join(f"a{i}" for i in range(arguments))
        scope: dict[str, Any] = {"typed": typed}
        # Numba asks for the number of arguments in the signature, and cannot be given *arguments.
        exec(  # noqa: S102
            f"def {emission.__name__}(context, tag, {names}):\n"
            f"    return typed(context, tag, {names})",
            scope,
        )
        return intrinsic(scope[emission.__name__])

    return decorate
