"""The label among the ``top`` largest logits: all rivals but ``top - 1`` are kept behind it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from cactus_edge import decision, specification
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.decide import Decider, Decision, Effort, method_of
from cactus_edge.certify.linear.search import Seconds
from cactus_edge.certify.prover import Prover
from cactus_edge.certify.query_search import Searcher
from cactus_edge.errors import UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.proofs import Proof


def check_top(graph: Graph, top: int) -> None:
    """Raise UsageError where ``top`` is no claim about a model's logits."""
    classes = graph.tensors[graph.logits].size
    if not 1 <= top < max(classes, 2):
        raise UsageError(
            f"top {top}: the model has {classes} logits; give a number from 1 to {classes - 1}"
        )


def several(
    decider: Decider,
    number: int,
    box: tuple[Int64Array, Int64Array],
    label: int,
    rivals: Sequence[int],
    top: int,
    effort: Effort,
    until: Seconds,
) -> Decision:
    """Exclude all of some rivals but ``top - 1``, or meet a point that breaks the claim.

    Args:
        decider: of a resolved graph.
        number: of its group, for the proofs.
        box: stored integers in the input's shape: lower and upper ends.
        label: index of a logit.
        rivals: those that nothing has excluded yet, at least ``top``.
        top: the label has to be among that many largest logits.
        effort: what may be done.
        until: of ``time.monotonic``.

    Raises:
        MissingExtraError: the method is ``complete`` and its solver is not installed.
    """
    graph, prover = decider.graph, Prover(decider)
    rule = specification.top(graph, label, top)
    proofs: list[Proof] = []
    for tried, rival in enumerate(rivals):
        missing = len(rivals) - top + 1 - len(proofs)
        if not missing or missing > len(rivals) - tried:
            break
        now = time.monotonic()
        share = now + (until - now) / (len(rivals) - tried)  # float: a clock
        found = prover.exclude(box, rule.unsafe[rival - (rival > label)], effort, share)
        if found.nodes is not None:
            proofs.append(Proof(number, rival, found.nodes))
        elif found.point is not None:
            logits = execute(graph, found.point[None])
            if decision.surely_wrong(graph, logits, np.array([label]), top)[0]:
                return Decision(tuple(proofs), False, "complete", found.point)
    return Decision(tuple(proofs), len(rivals) - len(proofs) < top, method_of(proofs))


def search_top(
    graph: Graph,
    lower: Int64Array,
    upper: Int64Array,
    labels: Int64Array,
    top: int,
    settings: Settings,
) -> list[Int64Array | None]:
    """For each box an input at which the label is surely not among the first ``top``, or None.

    Args:
        graph: resolved.
        lower: int64 [boxes, ...], the lower ends; ``upper`` likewise.
        upper: see ``lower``.
        labels: int64 [boxes].
        top: see the module's docstring.
        settings: strength of the search.
    """
    searcher = Searcher(graph)
    rules = {label: specification.top(graph, label, top) for label in np.unique(labels).tolist()}
    return [
        searcher.search(low, high, rules[int(label)], settings)
        for low, high, label in zip(lower, upper, labels, strict=True)
    ]
