"""The shipped optical flow: as good as its record says, and quick in a video."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import zoo
from datamodules import SyntheticFlowDataModule

NAME = "deq_flow_nano.synthetic"


@cache
def sequences(frames: int, count: int) -> tuple[Tensor, Tensor]:
    data = SyntheticFlowDataModule(batch_size=count, height=64, width=96, frames=frames, val_size=1, test_size=count)
    first, second, *_ = next(iter(data.test_dataloader()))
    return first, second


def error(flow: Tensor, target: Tensor) -> float:
    return float((flow - target).norm(dim=2).mean())


def test_it_is_as_good_as_its_record_says() -> None:
    (record,) = zoo.list_weights(NAME)
    model = zoo.load_pretrained(NAME)
    frames, target = sequences(3, 24)
    found = error(model.video(frames), target)
    assert found == pytest.approx(record.metrics["test_epe"], abs=0.3)
    assert found < 0.4 * error(torch.zeros_like(target), target)


def test_a_warm_start_takes_less_than_half_of_the_evaluations_to_the_same_error() -> None:
    """Two steps of it against five from rest: three evaluations against six, with that of the residual."""
    model = zoo.load_pretrained(NAME)
    frames, target = sequences(6, 12)
    warm = model.video(frames, steps=2)[:, 1:]
    cold = model.video(frames, warm_start=False, steps=5)[:, 1:]
    assert error(warm, target[:, 1:]) < error(cold, target[:, 1:])
    fewer = model.video(frames, warm_start=False, steps=2)[:, 1:]
    assert error(warm, target[:, 1:]) < 0.95 * error(fewer, target[:, 1:])
