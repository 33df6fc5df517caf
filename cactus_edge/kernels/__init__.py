"""Compiled kernels: a graph becomes a table of steps, which one compiled function walks.

``program`` places activations, packs weights and writes the table; ``walk`` runs it on a block of
images; the other modules are the kernels. Every kernel equals ``execute`` on every element.

Activations are bytes, NHWC: a uint8 tensor as it is, an int8 tensor plus 128. Accumulators are
int32, which is enough because ``constraints.validate`` proves |accumulator| < 2**27 for the stored
ranges, so no partial sum comes near 2**31.
"""
