"""vLLM side of DWDP: configuration, rendezvous, executors, workers, offline client and metrics."""
