"""Measurements beside TorchDEQ, on the same problems: ``python -m benchmarks.{solvers,models,transformer}``."""
