"""Interval propagation on the kernels: both ends of every activation, layer by layer."""
