"""Which compression of a trained network to deploy: figures of real files, and their Pareto front.

space    the candidates: sparsities, widths and members
measure  one candidate: converted, read back, certified, emulated; all of them: timed
store    finished candidates, kept in a folder
front    what no other beats; ``budget`` picks one of these
report   what is written; ``drawing`` draws it
run      ``search``: all of it
"""

from cactus_edge.search.budget import Limits
from cactus_edge.search.front import dominates, front
from cactus_edge.search.measure import board_named
from cactus_edge.search.report import Report, read
from cactus_edge.search.run import Request, search
from cactus_edge.search.space import BITS, SPARSITIES, Space

__all__ = [
    "BITS",
    "SPARSITIES",
    "Limits",
    "Report",
    "Request",
    "Space",
    "board_named",
    "dominates",
    "front",
    "read",
    "search",
]
