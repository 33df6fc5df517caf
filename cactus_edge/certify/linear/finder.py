"""CP-SAT on the deployed integers: an exact search for an input that breaks a claim.

Every accumulator is a linear expression and every stored value the index of the step that its
accumulator stands on, so the model *is* the network, whatever the rounding profile. An input that
is found is run by the reference executor before it counts. That none exists is only the solver's
word: it closes nothing, it tells the search that looking for a counterexample is over.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np

from cactus_edge.certify.linear.bounds import Interval, State, propagate
from cactus_edge.certify.linear.goals import PairGoal
from cactus_edge.certify.linear.lp import Relaxation
from cactus_edge.certify.linear.network import Network, Stairs
from cactus_edge.errors import MissingExtraError
from cactus_edge.graph import Int64Array

LARGEST = 200_000
"""Non-zero weights up to which a model is built."""


class Answer(Enum):
    """What the solver says; only ``FOUND`` comes with something that can be checked."""

    FOUND = "found"
    NONE = "none, says the solver"
    OPEN = "open"


def solver_module() -> Any:
    """CP-SAT's module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise MissingExtraError("ortools", "verify", "complete search") from None
    return cp_model


def find(
    network: Network, relaxation: Relaxation, box: Interval, goal: PairGoal, seconds: float
) -> tuple[Answer, Int64Array | None]:
    """Look for an input of ``box`` (offset values) at which the rival wins.

    Args:
        network: of a resolved graph.
        relaxation: holds the matrices of the network.
        box: lower and upper ends.
        goal: the claim to break.
        seconds: by the clock.

    Returns:
        The answer, and with ``FOUND`` the input's offset values.
    """
    state = propagate(network, box)
    assert state is not None, "a box without restrictions is not empty"
    module = solver_module()
    model = module.CpModel()
    logits, entry = _model(network, relaxation, state, goal, model)
    model.Add(logits[goal.rival] + goal.gap >= logits[goal.label] + 1)
    solver = module.CpSolver()
    solver.parameters.max_time_in_seconds = max(seconds, 0.1)
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.Solve(model)
    if status in (module.OPTIMAL, module.FEASIBLE):
        return Answer.FOUND, np.array([solver.Value(x) for x in entry], np.int64)
    return (Answer.NONE if status == module.INFEASIBLE else Answer.OPEN), None


def _model(
    network: Network, relaxation: Relaxation, state: State, goal: PairGoal, model: Any
) -> tuple[dict[int, Any], list[Any]]:
    """Variables of the two logits, by index, and of the input."""
    entry = network.graph.core_input
    held: dict[int, list[Any]] = {}
    low, high = state.values[entry]
    held[entry] = [
        int(a) if a == b else model.NewIntVar(int(a), int(b), "")
        for a, b in zip(low, high, strict=True)
    ]
    for index, node in enumerate(network.nodes):
        if not isinstance(node, Stairs):
            source = held[node.inputs[0]]
            held[node.output] = [source[i] if i >= 0 else 0 for i in node.sources.tolist()]
            continue
        wanted = (goal.label, goal.rival) if index == goal.node else range(node.bias.size)
        stored: list[Any] = [0] * node.bias.size
        for element in wanted:
            stored[element] = _step(relaxation, state, index, element, held, model)
        held[node.output] = stored
        if index == goal.node:
            return {c: stored[c] for c in wanted}, held[entry]
    raise AssertionError("a goal's node is one of the network's")


def _step(
    relaxation: Relaxation,
    state: State,
    index: int,
    element: int,
    held: dict[int, list[Any]],
    model: Any,
) -> Any:
    """The stored value of one element: an integer, or a variable tied to its accumulator."""
    node = relaxation.network.nodes[index]
    assert isinstance(node, Stairs)
    steps = node.staircase
    least, most, first, last = (int(x) for x in state.ranges[index][:4, element])
    if first == last:
        return first + steps.lowest
    rows = relaxation.rows(index, node)
    part = slice(int(rows.starts[element]), int(rows.starts[element + 1]))
    source = held[node.inputs[0]]
    accumulator = int(node.bias[element]) + sum(
        int(weight) * source[column]
        for column, weight in zip(rows.columns[part], rows.weights[part], strict=True)
    )
    inner = steps.thresholds[steps.kinds[element], first:last]
    lefts = [least, *inner.tolist()]
    rights = [*(inner - 1).tolist(), most]
    level = model.NewIntVar(0, last - first, "")
    left, right = (model.NewIntVar(least, most, "") for _ in range(2))
    model.AddElement(level, lefts, left)
    model.AddElement(level, rights, right)
    model.Add(accumulator >= left)
    model.Add(accumulator <= right)
    return level + first + steps.lowest
