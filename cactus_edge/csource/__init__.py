"""C for microcontrollers: a graph becomes two files of freestanding C99.

The device then computes exactly the integers of ``execute``: rounding is translated from the
syntax tree of ``semantics``, everything else is sums of products of integers.
"""

from __future__ import annotations

from cactus_edge.csource.assembly import CLayer, CSource, generate
from cactus_edge.csource.encoding import Layout
from cactus_edge.csource.syntax import translate

__all__ = ["CLayer", "CSource", "Layout", "generate", "translate"]
