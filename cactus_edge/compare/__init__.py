"""``compare``: a float network beside the integers that were made of it, layer by layer.

signal    how much of each layer's signal the integers keep
costs     what each layer's width and pruning cost, measured by sparing one layer after another;
          it needs torch, and is imported by itself
advice    what the figures suggest
"""

from cactus_edge.compare.advice import advice
from cactus_edge.compare.signal import LayerSignal, Signals, signals

__all__ = ["LayerSignal", "Signals", "advice", "signals"]
