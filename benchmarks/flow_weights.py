"""The DEQ flow of the benchmark, with weights that ship or those of a run, and sequences that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

import zoo
from datamodules.synthetic_flow import SyntheticFlowDataModule
from lightning_modules.starting_weights import load_weights
from zoo.flow import DEQFlow


@dataclass(frozen=True)
class Recipe:
    """A model, and the sequences on which it is measured.

    Attributes:
        weights: of ``zoo.list_weights()``, or a file of a ``deq_flow_nano`` that ``load_weights`` reads.
        height, width: of a frame, in pixels.
        frames: a sequence.
        sequences: how many.
    """

    weights: str
    height: int = 96
    width: int = 128
    frames: int = 6
    sequences: int = 16


NANO = Recipe("deq_flow_nano.synthetic")
SMALL = replace(NANO, height=32, width=48, frames=4, sequences=2)


@dataclass(frozen=True)
class Loaded:
    """A trained model in eval mode, and sequences that it was not trained on.

    Attributes:
        frames: ``(S, T, 3, H, W)``.
        flow: ``(S, T - 1, 2, H, W)``.
        valid: ``(S, T - 1, H, W)``.
    """

    model: DEQFlow
    frames: Tensor
    flow: Tensor
    valid: Tensor


def loaded(recipe: Recipe) -> Loaded:
    """The model, and the first test sequences of the synthetic set."""
    data = SyntheticFlowDataModule(
        recipe.sequences,
        height=recipe.height,
        width=recipe.width,
        frames=recipe.frames,
        val_size=1,
        test_size=recipe.sequences,
    )
    frames, flow, valid, *_ = next(iter(data.test_dataloader()))
    return Loaded(_model(recipe.weights).eval(), frames, flow, valid)


def _model(weights: str) -> DEQFlow:
    if weights in [record.name for record in zoo.list_weights()]:
        return cast(DEQFlow, zoo.load_pretrained(weights))
    model = cast(DEQFlow, zoo.create_model("deq_flow_nano"))
    load_weights(model, weights)
    return model
