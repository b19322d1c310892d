"""Prefetching: the ring of slots, acquire and release around a layer's expert compute, and the counters."""
