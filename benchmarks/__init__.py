"""Measurements of the backbone, beside TorchDEQ on the same problems: ``python -m benchmarks.solvers``."""
