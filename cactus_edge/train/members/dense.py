"""The network as it is."""

from __future__ import annotations

from cactus_edge.train.members.base import MemberKind


class Dense(MemberKind, frozen=True, tag="dense"):
    """The network as it is."""
