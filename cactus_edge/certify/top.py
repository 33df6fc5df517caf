"""The label among the ``top`` largest logits: all rivals but ``top - 1`` are kept behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from cactus_edge import specification
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.decide import Decider, Decision, Effort
from cactus_edge.certify.linear.search import Seconds
from cactus_edge.certify.prover import exclude_enough
from cactus_edge.certify.query_search import Searcher
from cactus_edge.errors import UsageError
from cactus_edge.graph import Graph, Int64Array


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
    rule = specification.top(decider.graph, label, top)
    left = [rival - (rival > label) for rival in rivals]
    found = exclude_enough(decider, number, box, rule, left, effort, until)
    proofs = (
        msgspec.structs.replace(proof, rival=proof.rival + (proof.rival >= label))
        for proof in found.proofs
    )
    return replace(found, proofs=tuple(proofs))


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
