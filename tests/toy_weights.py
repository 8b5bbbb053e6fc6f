"""Small models published as the zoo's own are, in a folder that the fixture ``weights_folder`` gives."""

from __future__ import annotations

from typing import Any

from torch import nn

import zoo
from zoo import records, weight_files


def publish(name: str = "tanh_deq.toy", **arguments: Any) -> nn.Module:
    """A tanh model with random weights, published as ``name``."""
    model = zoo.create_model("tanh_deq", **{"width": 6, "contraction": 0.7, **arguments})
    path = records.weights_dir() / f"{name}.safetensors"
    spec = zoo.save_weights(model, path)
    records.save_record(
        zoo.WeightsRecord(
            name=name,
            model=spec.model,
            arguments=spec.arguments,
            source="shipped",
            sha256=weight_files.sha256_of(path.read_bytes()),
            num_parameters=sum(p.numel() for p in model.parameters()),
            trained_on="nothing",
            recipe="none",
            metrics={"val_accuracy": 0.5, "test_accuracy": 0.12345678},
            licence="MIT",
            preprocessing="images (B, 64) in [0, 1]",
        )
    )
    return model
