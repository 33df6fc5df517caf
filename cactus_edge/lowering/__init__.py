"""From a folded float network to integers: what the converters of torch and of ONNX share.

A network is a list of ``stages`` in float64 arrays. ``calibration`` finds the range of what each
stage yields, ``storage`` and ``assembly`` make the integer graph, ``shadow`` compares the two.
"""
