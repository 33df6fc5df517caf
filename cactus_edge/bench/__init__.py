"""Latency, throughput, start and memory of our runtime beside its peers, on one machine.

timing       the protocol: who takes turns, and how samples become figures
peers        runtimes behind one interface; ``onnx_io.qdq`` and ``torch_model`` make their
             form of a graph
child        start and memory of one runtime in a process of its own
run          ``benchmark``: all of it for one model
ceilings     what the machine can do at best; ``roofline`` compares
drawing      SVG
machine, pi  what the machine reports of itself; the protocol for a Raspberry Pi
"""

from cactus_edge.bench.peers import Model, Ours, Peer, all_peers
from cactus_edge.bench.run import Benchmark, Figures, Start, benchmark

__all__ = ["Benchmark", "Figures", "Model", "Ours", "Peer", "Start", "all_peers", "benchmark"]
