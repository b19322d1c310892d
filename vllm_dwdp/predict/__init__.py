"""Predict: what DWDP costs and gains for a model on a machine, before anyone rents it. Pure Python and NumPy.

docs/predict.md explains the model, its five fitted constants and how well it reproduces what was published.
"""
