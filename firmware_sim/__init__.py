"""Runs generated C on the instruction sets of real microcontrollers, and on this computer.

``simulate(graph, inputs)`` compiles a graph for a board, emulates it and reports outputs, exact
instruction counts, flash, RAM and stack; ``run_host`` runs the same C natively. Both equal
``cactus_edge.execute.execute`` bit by bit. Needs: pip install 'cactus-edge[sim]'.
"""

from __future__ import annotations

from firmware_sim.boards import BOARDS, CPUS, Board
from firmware_sim.certified import Verdicts, certify_board, certify_host
from firmware_sim.host import HostRun, run_host
from firmware_sim.injection import Fault, Flips, Injector, flip_tables
from firmware_sim.qemu import certify_qemu, count_qemu, run_qemu
from firmware_sim.simulation import Instructions, Simulation, fit, simulate
from firmware_sim.timing import Cycles

__all__ = [
    "BOARDS",
    "CPUS",
    "Board",
    "Cycles",
    "Fault",
    "Flips",
    "HostRun",
    "Injector",
    "Instructions",
    "Simulation",
    "Verdicts",
    "certify_board",
    "certify_host",
    "certify_qemu",
    "count_qemu",
    "fit",
    "flip_tables",
    "run_host",
    "run_qemu",
    "simulate",
]
