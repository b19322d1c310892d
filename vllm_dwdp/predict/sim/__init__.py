"""Simulator: fleets of ranks with their own requests, under DWDP, DEP, tensor and plain data parallelism.

Ranks of DWDP never wait for each other, and ranks of DEP and TP only within their group: so groups are simulated one
after the other, each with its own clock, and no library of events is needed. That is what makes 10,000 ranks cheap.
"""
