"""MoE layers: share-only loading and the weight views."""
