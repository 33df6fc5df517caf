"""VNN-LIB: both versions, exact numbers, the mapping to stored integers, hostile files."""

from __future__ import annotations

import time
from fractions import Fraction
from functools import cache, reduce
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cactus_edge import inputs, scales, vnnlib
from cactus_edge.errors import DataError
from cactus_edge.execute import execute
from cactus_edge.graph import DType, Graph
from cactus_edge.vnnlib.formula import MOST_DISJUNCTS
from cactus_edge.vnnlib.query import Bound
from cactus_edge.vnnlib.syntax import DEEPEST
from tests.graphs import enumerate_box, random_graph

FLAT = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (>= X_0 0.1)) (assert (<= X_0 0.2)) (assert (>= X_1 -3)) (assert (<= X_1 5))\n"
NETWORK = """(vnnlib-version <2.0>)
(declare-network f
  (declare-input X real [1,2])   ; the picture
  (declare-output Y real [1,3])
)
"""


def parse(text: str) -> vnnlib.Query:
    return vnnlib.parse(text.encode(), "q.vnnlib")


@cache
def model(seed: int = 0, **options: object) -> Graph:
    return random_graph(np.random.default_rng(seed), shape=(1, 2), depth=1, classes=3, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- reading
def test_version_1() -> None:
    query = parse(FLAT + BOX + "(assert (or (and (<= Y_0 Y_1) (< Y_0 2.5)) (>= Y_2 1e-2)))")
    assert (query.version, query.input.size, query.output.size) == (1, 2, 3)
    (case,) = query.cases
    assert case.lower == (Bound(Fraction(1, 10)), Bound(Fraction(-3)))
    assert case.upper == (Bound(Fraction(1, 5)), Bound(Fraction(5)))
    (first, second), (third,) = case.unsafe
    assert first.terms == ((("Y", 0), Fraction(-1)), (("Y", 1), Fraction(1)))
    assert (first.constant, first.strict) == (0, False)
    assert (second.constant, second.strict) == (Fraction(5, 2), True)
    assert (third.terms, third.constant) == (((("Y", 2), Fraction(1)),), Fraction(-1, 100))


def test_version_2_says_the_same() -> None:
    """The standard's example, with indices, a chain, an equation and a negation."""
    query = parse(
        NETWORK
        + "(assert (<= 0.1 X[0,0] 0.2)) (assert (and (>= X [0, 1] -3.0) (not (> X[0,1] 5.0))))"
        + "(assert (or (and (<= Y[0,0] Y[0,1]) (< (* 2.0 Y[0,0]) 5.0)) (>= Y[0,2] 0.01)))"
    )
    other = parse(FLAT + BOX + "(assert (or (and (<= Y_0 Y_1) (< Y_0 2.5)) (>= Y_2 1e-2)))")
    assert query.version == 2
    graph = model()
    (a,), (b,) = (vnnlib.bind(q, graph) for q in (query, other))
    assert np.array_equal(a.lower, b.lower) and np.array_equal(a.upper, b.upper)
    assert a.specification == b.specification


def test_scalar_tensors_and_onnx_names() -> None:
    query = parse(
        '(declare-network f (declare-input X float32 [2] "input") (declare-output Y Real []))'
        "(assert (<= 0 X[0] 1)) (assert (<= 0 X[1] 1)) (assert (>= Y 0.5))"
    )
    assert (query.output.size, query.output.shape) == (1, ())
    assert query.cases[0].unsafe[0][0].terms == ((("Y", 0), Fraction(1)),)


def test_boxes_in_an_or_become_cases_and_equal_boxes_one() -> None:
    text = (
        FLAT
        + "(assert (<= 0 X_1 1))"
        + "(assert (or (and (<= 0 X_0 1) (> Y_0 1)) (and (<= 2 X_0 3) (> Y_1 1))"
        + " (and (<= X_0 1) (>= X_0 0) (> Y_2 1)) (and (<= 5 X_0 4) (> Y_0 0))))"
    )
    first, second = parse(text).cases
    assert [b.value for b in (first.lower[0], first.upper[0])] == [0, 1]
    assert len(first.unsafe) == 2 and len(second.unsafe) == 1
    assert [b.value for b in (second.lower[0], second.upper[0])] == [2, 3]


def test_strict_and_repeated_bounds_tighten() -> None:
    (case,) = parse(
        FLAT + "(assert (and (> X_0 0) (>= X_0 0) (< (* -2 X_0) 1) (<= X_0 1) (< X_0 1)"
        " (= X_1 (/ 8 255))))"
    ).cases
    assert (case.lower[0], case.upper[0]) == (Bound(Fraction(0), True), Bound(Fraction(1), True))
    assert case.lower[1] == case.upper[1] == Bound(Fraction(8, 255))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "declares nothing"),
        ("(", r"q.vnnlib:1: a '\(' without"),
        ("\n)", r"q.vnnlib:2: a '\)' without"),
        ("X", "outside of a list"),
        ("(assert)", "'assert' takes one formula"),
        (FLAT, "asserts nothing"),
        (FLAT + "\n(assert (<= X_9 0))", "q.vnnlib:7: 'X_9' is not declared"),
        (FLAT + "(assert (<= X_0))", "'<=' with 1 operands"),
        (FLAT + "(assert (!= X_0 1 2))", "'!=' with 3 operands"),
        (FLAT + "(assert (<= (* X_0 X_1) 0))", "not linear"),
        (FLAT + "(assert (<= (/ 1 X_1) 0))", "not linear"),
        (FLAT + "(assert (<= (/ X_0 0) 0))", "division by 0"),
        (FLAT + "(assert (<= (sin X_0) 0))", "'sin' is no arithmetic"),
        (FLAT + "(assert (=> X_0 0))", "'=>' is no formula"),
        (FLAT + "(assert true)", "'true' is no formula"),
        (FLAT + BOX + "(assert (<= (+ X_0 X_1) 0))", "relates inputs with one another"),
        (FLAT + BOX + "(assert (<= X_0 Y_0))", "relates inputs with outputs"),
        (FLAT + "(assert (<= X_0 1)) (assert (<= Y_0 0))", "input 0 has no lower bound"),
        (FLAT + BOX + "(assert (< X_0 0.1))", "no input satisfies"),
        (FLAT + BOX + "(assert (< 1 0))", "no input satisfies"),
        (FLAT + "(declare-const X_0 Real)", "'X_0' is declared twice"),
        ("(declare-const X_0 Int)", r"write \(declare-const X_0 Real\)"),
        ("(declare-const Z Real)", r"write \(declare-const X_0 Real\)"),
        ("(declare-const X_1 Real)(declare-const Y_0 Real)(assert (< Y_0 0))", "'X_0' is not decl"),
        ("(declare-const X_0 Real)(assert (< X_0 0))", "'Y_0' is not declared"),
        ("(push)", "unknown command 'push'"),
        ("(vnnlib-version <3.0>)", "the version is"),
        (NETWORK + NETWORK, "stands once"),
        (NETWORK + "(declare-const X_0 Real)", "belongs to version 1"),
        (FLAT + NETWORK[23:], "belongs to version 2"),
        (NETWORK + "(assert (< X[0] 0))", "has 2 dimensions, not 1"),
        (NETWORK + "(assert (< X 0))", "has 2 dimensions, not 0"),
        (NETWORK + "(assert (< X[0,2] 0))", r"X\[0, 2\] is outside of shape \[1, 2\]"),
        (NETWORK + "(assert (< X[-1,0] 0))", "unexpected"),
        (NETWORK.replace("real [1,2]", "complex64 [1,2]"), "no element type 'complex64'"),
        (NETWORK.replace("[1,2]", "[0,2]"), "a tensor of 0 elements"),
        (NETWORK.replace("[1,2]", "[99999,99999]"), "a tensor of"),
        (NETWORK.replace(" Y ", " X "), "of different names"),
        (NETWORK.replace("declare-output", "declare-hidden"), "'declare-hidden' is not supported"),
        (FLAT + "(assert (<= X_0 1e999999999))", "exponent"),
        (FLAT + "(assert (<= X_0 " + "9" * 200 + "))", "longer than 100"),
        (FLAT + "(assert (<= X_0 (* " + "1e60 " * 30 + ")))", "more than 4096 bits"),
        ("(" * 200, "nested deeper"),
    ],
)
def test_bad_files_are_refused_with_their_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(text)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(DataError, match="q.vnnlib:2: not UTF-8"):
        vnnlib.parse(b"(a)\n\xff", "q.vnnlib")


# ---------------------------------------------------------------- hostile files
def test_exponential_normal_forms_are_refused_quickly() -> None:
    begin = time.perf_counter()
    choices = "".join(f"(assert (or (< Y_0 {i}) (> Y_1 {i})))" for i in range(60))
    nested = "(< Y_0 0)"
    for i in range(40):
        nested = f"(and (or {nested} (< Y_1 {i})) (!= Y_2 {i}))"[: 1 << 20]
    unequal = "".join(f"(assert (!= Y_0 {i}))" for i in range(500))
    for text in (choices, f"(assert {nested})", unequal):
        with pytest.raises(DataError, match=f"more than {MOST_DISJUNCTS} disjuncts|nested deeper"):
            parse(FLAT + BOX + text)
    assert time.perf_counter() - begin < 10


def test_long_files_take_linear_time() -> None:
    """Processor time, which another process does not lengthen; squares would take ten times it."""
    count = 2000
    names = "".join(f"(declare-const X_{i} Real)" for i in range(count))
    bounds = "".join(f"(assert (<= X_{i} 0.5))\n(assert (>= X_{i} 0.25))" for i in range(count))
    total = " ".join(f"(* 1.5 Y_{i % 2})" for i in range(8000))
    text = names + FLAT[FLAT.index("(declare-const Y_0") :] + bounds + f"(assert (< (+ {total}) 1))"
    begin = time.process_time()
    (case,) = parse(text).cases
    assert time.process_time() - begin < 4
    assert len(case.lower) == count
    assert case.unsafe[0][0].terms == ((("Y", 0), Fraction(-6000)), (("Y", 1), Fraction(-6000)))
    product_ = "(* " + "1 " * 25000 + "(+ " + "Y_0 " * 25000 + "))"
    begin = time.process_time()
    parse(FLAT + BOX + f"(assert (< {product_} 1))")
    assert time.process_time() - begin < 5


TOKENS = st.sampled_from(
    ["(", ")", "(assert ", "(or ", "(and ", "(not ", "(<= ", "(!= ", "(= ", "(+ ", "(* ", "(/ "]
    + ["X_0 ", "Y_0 ", "Y_1 ", "X", "Y", "[0,1]", "[", "]", "1 ", "-0.5 ", "1e9 ", ";", "\n", '"']
    + ["(declare-const ", "Real", "(vnnlib-version <2.0>)", "(declare-network f ", "<2.0>"]
    + ["(declare-input X real [1,2])", "(declare-output Y real [1,3])", "real ", "\u2028", "٣"]
)


@given(
    content=st.binary(max_size=200)
    | st.lists(TOKENS, max_size=60).map(lambda t: "".join(t).encode())
)
@example(content=b"(declare-network)")
@example(content=b"()")
@example(content=b"(())")
@example(content=b"(assert (()))")
@example(content=b"(vnnlib-version)")
@example(content=b"(assert (< ((1)) 1))")
def test_any_bytes_are_a_query_or_a_data_error(content: bytes) -> None:
    for prefix in (b"", FLAT.encode() + BOX.encode(), NETWORK.encode()):
        try:
            query = vnnlib.parse(prefix + content, "q.vnnlib")
        except DataError as error:
            assert str(error).startswith("q.vnnlib")
        else:
            assert query.cases


def test_depth_just_inside_the_limit_is_read() -> None:
    deep = DEEPEST - 3
    text = "(not " * deep + "(< Y_0 1)" + ")" * deep
    (case,) = parse(FLAT + BOX + f"(assert {text})").cases
    assert case.unsafe[0][0].strict == (deep % 2 == 0)


# ---------------------------------------------------------------- round trip
# Small enough for equality to happen at points of the grid, and some that are not.
NUMBERS = st.sampled_from(["0", "1", "-1", "2.0", "-0.5", "1.5", "2.5e-1", "-3"])
GRID = list(product(range(-2, 3), repeat=3))


@st.composite
def arithmetic(draw: st.DrawFn, depth: int = 2) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(NUMBERS | st.sampled_from(["Y_0", "Y_1", "Y_2"]))
    parts = draw(st.lists(arithmetic(depth - 1), min_size=1, max_size=3))
    operator = draw(st.sampled_from(["+", "-", "*"]))
    if operator == "*":
        return f"(* {draw(NUMBERS)} {parts[0]} {draw(NUMBERS)})"
    return f"({operator} {' '.join(parts)})"


@st.composite
def formulas(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        operator = draw(st.sampled_from(["<=", ">=", "<", ">", "=", "==", "!="]))
        count = 2 if operator == "!=" else draw(st.integers(2, 3))
        sides = [draw(arithmetic()) for _ in range(count)]
        return f"({operator} {' '.join(sides)})"
    if draw(st.integers(0, 3)) == 0:
        return f"(not {draw(formulas(depth - 1))})"
    parts = draw(st.lists(formulas(depth - 1), min_size=1, max_size=3))
    return f"({draw(st.sampled_from(['and', 'or']))} {' '.join(parts)})"


def value(text: list[str], logits: np.ndarray) -> np.ndarray:
    """An evaluator of its own: consumes tokens, knows nothing of normal forms.

    ``logits`` are binary64 [outputs, points]: all values are small multiples of small powers of
    two, so that nothing is ever rounded.
    """
    token = text.pop(0)
    if token != "(":
        return logits[int(token[2:])] if token[0] == "Y" else np.full(len(GRID), float(token))
    operator = text.pop(0)
    arguments = []
    while text[0] != ")":
        arguments.append(value(text, logits))
    text.pop(0)
    pairs = list(zip(arguments, arguments[1:], strict=False))
    match operator:
        case "and":
            return reduce(np.logical_and, arguments)
        case "or":
            return reduce(np.logical_or, arguments)
        case "not":
            return ~arguments[0]
        case "+":
            return sum(arguments[1:], arguments[0])
        case "-":
            return -arguments[0] if not pairs else arguments[0] - sum(arguments[1:])
        case "*":
            return arguments[0] * arguments[1] * arguments[2]
        case "<=":
            return reduce(np.logical_and, [a <= b for a, b in pairs])
        case ">=":
            return reduce(np.logical_and, [a >= b for a, b in pairs])
        case "<":
            return reduce(np.logical_and, [a < b for a, b in pairs])
        case ">":
            return reduce(np.logical_and, [a > b for a, b in pairs])
        case "!=":
            return arguments[0] != arguments[1]
        case _:
            return reduce(np.logical_and, [a == b for a, b in pairs])


@settings(max_examples=50)
@given(text=formulas())
@example("(!= Y_0 1)")
@example("(not (!= Y_0 1))")
@example("(not (= Y_0 1 Y_1))")
@example("(not (<= Y_0 1))")
@example("(not (< Y_0 1 Y_1))")
@example("(not (or (>= Y_0 1) (> Y_1 0)))")
def test_integer_atoms_say_what_the_formula_says(text: str) -> None:
    """Stored variables: the specification is violated exactly where the formula is true."""
    try:
        query = parse(FLAT + BOX.replace("0.1", "0").replace("0.2", "9") + f"(assert {text})")
        (case,) = vnnlib.bind(query, model(), "stored")
    except DataError as error:
        assert "no input satisfies" in str(error)
        violated = [False] * len(GRID)
    else:
        violated = [case.specification.violated(point) for point in GRID]
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()
    assert violated == value(tokens, np.array(GRID, float).T).tolist()


# ---------------------------------------------------------------- binding to a model
SLACK = Fraction(1, 1 << 22)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[inputs.InputMap, Fraction, Fraction]:
    """Ends anywhere, and ends that lie on a tie, or on what float errors make of one."""
    exact = draw(st.booleans())
    scale = draw(st.sampled_from([Fraction(1, 255), Fraction(1, 100), Fraction(3, 256)]))
    mapping = inputs.InputMap(scale, draw(st.sampled_from([-128, 0, 7])), (-128, 127), exact)
    ends: list[Fraction] = []
    for _ in range(2):
        if draw(st.booleans()):
            ends.append(draw(st.fractions(-1, 2, max_denominator=600)))
            continue
        tie = draw(st.integers(-150, 280)) + Fraction(1, 2)
        factor = draw(st.sampled_from([Fraction(1), 1 / (1 + SLACK), 1 / (1 - SLACK)]))
        ends.append(tie * factor * scale)
    return mapping, min(ends), max(ends)


@settings(max_examples=80)
@given(interval=intervals(), strict=st.tuples(st.booleans(), st.booleans()))
def test_real_inputs_become_every_integer_that_a_quantizer_makes(
    interval: tuple[inputs.InputMap, Fraction, Fraction], strict: tuple[bool, bool]
) -> None:
    """Against brute force over all levels: is some real of the interval within half a step?"""
    mapping, lower, upper = interval
    if lower == upper:
        strict = (False, False)
    found = [
        inputs.real_level(mapping, end, up=up, strict=is_strict)
        for end, up, is_strict in zip((lower, upper), (False, True), strict, strict=True)
    ]
    least, greatest = mapping.limits
    slack = Fraction(0) if mapping.exact else SLACK
    a, b = lower / mapping.scale, upper / mapping.scale
    a, b = a - abs(a) * slack, b + abs(b) * slack
    levels = np.arange(least - 700, greatest + 701, dtype=object)  # Python's integers: exact
    # Quotients that may be stored as a level: a closed interval, ties included; in halves.
    low, high = (2 * (levels - mapping.zero_point) + side for side in (-1, 1))
    above_a = high * a.denominator - 2 * a.numerator
    below_b = 2 * b.numerator - low * b.denominator
    inside = (above_a > 0) | ((above_a == 0) & (not strict[0]))
    inside &= (below_b > 0) | ((below_b == 0) & (not strict[1]))
    reached = np.clip(levels[inside], least, greatest)
    assert reached.size and found == [reached.min(), reached.max()]


def test_a_box_of_reals_is_the_box_of_the_perturbation() -> None:
    """Where the ball lies inside [0, 1] both say the same."""
    for seed in range(8):
        graph = model(seed)
        image = np.array([[100, 150]], np.uint8)
        epsilon = Fraction(7, 100)
        text = ""
        for i, pixel in enumerate(image[0].tolist()):
            centre = Fraction(pixel, 255)
            low, high = centre - epsilon, centre + epsilon
            text += f"(assert (<= (/ {low.numerator} {low.denominator}) X_{i} "
            text += f"(/ {high.numerator} {high.denominator})))"
        (case,) = vnnlib.bind(parse(FLAT + text + "(assert (< Y_0 Y_1))"), graph)
        lower, upper = inputs.box(graph, image, inputs.Perturbation.epsilon(epsilon))
        assert np.array_equal(case.lower, lower) and np.array_equal(case.upper, upper)


def test_real_outputs_against_every_point_of_the_box() -> None:
    for seed in range(6):
        graph = model(seed)
        (case,) = vnnlib.bind(
            parse(
                FLAT + "(assert (<= 0.3 X_0 0.32)) (assert (<= 0.5 X_1 0.53))"
                "(assert (or (<= (+ Y_0 (* -0.5 Y_1)) 0.01) (> Y_2 0.2)))"
            ),
            graph,
        )
        quantization = graph.tensors[graph.logits].quantization
        assert quantization is not None
        scale = scales.decode_float32(quantization.scale_bits).fraction()
        for logits in execute(graph, enumerate_box(case.lower[0], case.upper[0])):
            y = [scale * (int(q) - quantization.zero_point) for q in logits]
            expected = y[0] - y[1] / 2 <= Fraction(1, 100) or y[2] > Fraction(1, 5)
            assert case.specification.violated(logits) == expected


def test_stored_variables_are_taken_as_they_are() -> None:
    text = FLAT + "(assert (and (> X_0 -2.5) (<= X_0 3) (> X_1 4) (< X_1 900) (>= Y_0 1.5)))"
    (case,) = vnnlib.bind(parse(text), model(), "stored")
    assert (case.lower.tolist(), case.upper.tolist()) == ([[-2, 5]], [[3, 127]])
    assert [case.specification.violated([q, 0, 0]) for q in (1, 2)] == [False, True]
    empty = FLAT + "(assert (and (< 2 X_0 3) (<= 0 X_1 1) (>= Y_0 0)))"
    with pytest.raises(DataError, match="no stored input"):
        vnnlib.bind(parse(empty), model(), "stored")


def test_unsigned_inputs_have_their_own_limits() -> None:
    graph = model(input_type=DType.UINT8)
    text = FLAT + "(assert (and (<= -5 X_0 300) (<= 1 X_1 2) (>= Y_0 1.5)))"
    (case,) = vnnlib.bind(parse(text), graph, "stored")
    assert (case.lower.tolist(), case.upper.tolist()) == ([[0, 1]], [[255, 2]])


def test_queries_that_do_not_fit_the_model() -> None:
    three = NETWORK.replace("[1,3]", "[1,4]") + "(assert (<= 0 X[0,0] 1))(assert (<= 0 X[0,1] 1))"
    with pytest.raises(DataError, match=r"declares an output of \[1, 4\], the model's is \[1, 3\]"):
        vnnlib.bind(parse(three), model())
    stored = NETWORK.replace("X real", "X int8") + "(assert (<= 0 X[0,0] 1 ))"
    stored += "(assert (<= 0 X[0,1] 1))"
    with pytest.raises(DataError, match="declared int8; read the query with stored"):
        vnnlib.bind(parse(stored), model())
    assert vnnlib.bind(parse(stored), model(), "stored")
    with pytest.raises(DataError, match="not 'other'"):
        vnnlib.bind(parse(stored), model(), "other")  # type: ignore[arg-type]
    softmax = model(edges=("SOFTMAX",))
    query = parse(FLAT + BOX + "(assert (< Y_0 Y_1))")
    with pytest.raises(DataError, match="SOFTMAX"):
        vnnlib.bind(query, softmax)
    whole = parse(FLAT + "(assert (and (<= 0 X_0 1) (<= 0 X_1 1) (< Y_0 Y_1)))")
    assert vnnlib.bind(whole, softmax, "stored")


def test_channels_first_is_refused_where_the_order_differs() -> None:
    graph = random_graph(np.random.default_rng(1), shape=(1, 2, 3, 2), depth=0, classes=2)

    def query(shape: tuple[int, ...]) -> vnnlib.Query:
        names = [f"X[{','.join(map(str, i))}]" for i in product(*map(range, shape))]
        bounds = "".join(f"(assert (<= 0 {name} 1))" for name in names)
        return parse(
            f"(declare-network f (declare-input X real {str(list(shape)).replace(' ', '')})"
            f"(declare-output Y real [2])) {bounds} (assert (< Y[0] Y[1]))"
        )

    for shape in ((1, 2, 3, 2), (2, 3, 2), (12,), (1, 12)):
        assert vnnlib.bind(query(shape), graph)
    with pytest.raises(DataError, match="in the model's own order"):
        vnnlib.bind(query((1, 2, 2, 3)), graph)
