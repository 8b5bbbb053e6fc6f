"""Weights: written, recorded, verified at each load, adapted; and those that ship are what their records say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import zoo
from tests.command_line import ROOT, same
from zoo import weights
from zoo.implicit import Anderson, ImplicitGradient, Newton, PhantomGradient

CHOICES = {"solver": Newton(tol=1e-3), "gradient": PhantomGradient(steps=2)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights ship, and nothing does yet."""
    monkeypatch.setattr(weights, "weights_dir", lambda: tmp_path)
    weights._records.cache_clear()
    monkeypatch.callback = weights._records.cache_clear  # type: ignore[attr-defined]
    return tmp_path


def publish(name: str = "tanh_deq.toy", **arguments: Any) -> nn.Module:
    """A small model with random weights, published under ``name``."""
    model = zoo.create_model("tanh_deq", **{"width": 6, "contraction": 0.7, **arguments})
    path = weights.weights_dir() / f"{name}.safetensors"
    spec = zoo.save_weights(model, path)
    weights.save_record(
        zoo.WeightsRecord(
            name=name,
            model=spec.model,
            arguments=spec.arguments,
            source="shipped",
            sha256=weights.sha256_of(path.read_bytes()),
            num_parameters=sum(p.numel() for p in model.parameters()),
            trained_on="nothing",
            recipe="none",
            metrics={"test_accuracy": 0.12345678},
            licence="MIT",
            preprocessing="images (B, 64) in [0, 1]",
        )
    )
    return model
