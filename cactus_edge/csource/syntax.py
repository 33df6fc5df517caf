"""Functions of ``semantics`` as C99, translated from their own syntax tree.

Nothing about rounding is written here: the text that the reference executor runs is the text that
the device compiles. The subset is what C and Python agree on for integers: assignment to a new
name, return, ``+ - * // >> &``, ``1 <<``, single comparisons (0 or 1 in both) and calls to other
functions of ``semantics``. ``//`` becomes C's truncating ``/``, which is the same wherever both
operands are not negative, and ``semantics`` divides nothing else.

A function exists in two widths. 64 is the plain one, ``int64_t`` throughout. In width 32 all is
``int32_t`` but the product in ``multiply_high``; 32-bit processors need a third of the instructions
for it. It is used only where ``assembly`` knows that every intermediate fits: double rounding with
|accumulator| < 2**30 and shifts up to 30 (``multiply_high`` never enlarges), clamps and averages.

Two functions have another text in C, for which compilers or processors have one instruction: the
clamp, and the product of width 32. Tests compare them with ``semantics`` as they do the others.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Literal

from cactus_edge import semantics
from cactus_edge.errors import UsageError

Width = Literal[32, 64]
SemanticsFunction = Callable[..., int]

_CLAMP = "  return x < lower ? lower : x > upper ? upper : x;\n"
# SMMULR rounds its upper word: (2 x m + 2^31) >> 32. Doubling loses nothing below 2^30.
_MULTIPLY_HIGH_32 = """\
#ifdef PAIRS
  (void)multiply_high;
  int32_t high;
  __asm("smmulr %0, %1, %2" : "=r"(high) : "r"(2 * x), "r"(multiplier));
  return high;
#else
  return (int32_t)multiply_high(x, multiplier);
#endif
"""
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "/",
    ast.RShift: ">>",
    ast.LShift: "<<",
    ast.BitAnd: "&",
}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
}


def c_name(name: str, width: Width) -> str:
    """The C name of a semantics function in a width."""
    return name if width == 64 else f"{name}_32"


def translate(function: SemanticsFunction, *, width: Width = 64) -> str:
    """C99 text of one function, a ``static inline`` definition.

    Args:
        function: of ``semantics``, or one written in the same subset that calls only those.
        width: bits of every variable, but not of the product in ``multiply_high``.

    Raises:
        UsageError: something is outside the subset; the message names line and source.
    """
    return _Translator(function, width).definition()


def translate_all(functions: Iterable[tuple[SemanticsFunction, Width]]) -> str:
    """Definitions of these functions and of all they call, callees first, each once."""
    texts: dict[str, str] = {}

    def add(function: SemanticsFunction, width: Width) -> None:
        translator = _Translator(function, width)
        if c_name(function.__name__, width) in texts:
            return
        text = translator.definition()
        for name, called_width in translator.calls:
            add(getattr(semantics, name), called_width)
        texts[c_name(function.__name__, width)] = text

    for function, width in sorted(functions, key=lambda pair: (pair[0].__name__, pair[1])):
        add(function, width)
    return "\n".join(texts.values())


class _Translator:
    """One function; ``calls`` lists what it calls and in which width, in order of appearance."""

    def __init__(self, function: SemanticsFunction, width: Width) -> None:
        self.name = function.__name__
        self.width: Width = width
        self.calls: list[tuple[str, Width]] = []
        lines, self.first_line = inspect.getsourcelines(function)
        self.source = textwrap.dedent("".join(lines))
        self.known: set[str] = set()

    @property
    def type(self) -> str:
        return f"int{self.width}_t"

    def definition(self) -> str:
        definition = ast.parse(self.source).body[0]
        if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
            raise self.outside(definition)
        given = definition.args
        extras = (*given.posonlyargs, *given.kwonlyargs, *given.defaults, given.vararg, given.kwarg)
        if any(part is not None for part in extras):
            raise self.outside(definition)
        names = [argument.arg for argument in given.args]
        self.known.update(names)
        if (self.name, self.width) == ("multiply_high", 32):
            self.calls.append((self.name, 64))
            body = _MULTIPLY_HIGH_32
        elif self.name == "clamp":
            body = _CLAMP
        else:
            body = self.body(definition)
        arguments = ", ".join(f"{self.type} {name}" for name in names)
        head = f"static inline {self.type} {c_name(self.name, self.width)}({arguments})"
        return f"{head}\n{{\n{body}}}\n"

    def body(self, definition: ast.FunctionDef) -> str:
        statements = [self.statement(statement) for statement in definition.body]
        if not isinstance(definition.body[-1], ast.Return):
            raise self.outside(definition.body[-1])
        return "".join(f"  {line}\n" for line in statements if line)

    def statement(self, node: ast.stmt) -> str:
        match node:
            case ast.Expr(ast.Constant(value=str())):
                return ""
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name not in self.known:
                text = self.expression(value)
                self.known.add(name)
                return f"const {self.type} {name} = {text};"
            case ast.Return(value=ast.expr() as value):
                return f"return {self.expression(value)};"
            case _:
                raise self.outside(node)

    def expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self.known:
                return name
            case ast.Constant(value=value) if type(value) is int:
                if value >> (self.width - 1):
                    raise self.outside(node)
                return f"INT{self.width}_C({value})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                one = isinstance(left, ast.Constant) and left.value == 1
                if isinstance(op, ast.LShift) and not one:
                    raise self.outside(node)
                symbol = _BINARY[type(op)]
                return f"({self.expression(left)} {symbol} {self.expression(right)})"
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                symbol = _COMPARISONS[type(op)]
                return f"({self.expression(left)} {symbol} {self.expression(right)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(node, name, arguments)
            case _:
                raise self.outside(node)

    def call(self, node: ast.expr, name: str, arguments: list[ast.expr]) -> str:
        callee = getattr(semantics, name, None)
        if not inspect.isfunction(callee) or len(arguments) != len(
            inspect.signature(callee).parameters
        ):
            raise self.outside(node)
        self.calls.append((name, self.width))
        inner = ", ".join(self.expression(argument) for argument in arguments)
        return f"{c_name(name, self.width)}({inner})"

    def outside(self, node: ast.AST) -> UsageError:
        line = getattr(node, "lineno", 1)
        text = (ast.get_source_segment(self.source, node) or self.source).splitlines()[0]
        return UsageError(
            f"{self.name}, line {self.first_line + line - 1}: `{text.strip()}` is outside the "
            f"subset that becomes C ({self.width} bits); see the docstring of semantics.py"
        )
