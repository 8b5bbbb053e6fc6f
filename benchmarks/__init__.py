"""Measurements beside TorchDEQ, or torchvision's RAFT, on the same problems: ``python -m benchmarks.NAME``.

The names are solvers, models, transformer and flow.
"""
