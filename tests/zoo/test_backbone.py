"""A classifier's stem and equilibrium in a segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.originals.mdeq import original_name

CELL: dict[str, Any] = {"channels": (8, 16, 16), "expansion": 2, "stem_stride": 4, "post_affine": True}


def classifier(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model("mdeq", **{**CELL, "head_widths": (2, 2, 2), "final_width": 5, **changes})


def segmenter(**changes: Any) -> nn.Module:
    torch.manual_seed(1)
    return zoo.create_model("mdeq_segmenter", **{**CELL, "num_classes": 4, **changes})


def test_stem_and_cell_are_copied_and_the_head_is_not() -> None:
    source, model = classifier(), segmenter()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    zoo.load_backbone(model, source)
    theirs = source.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head.") else theirs[key]), key
    assert not torch.equal(theirs["stem.0.weight"], before["stem.0.weight"])


def test_from_a_file_of_the_original_authors(tmp_path: Path) -> None:
    """One with the sizes of a registered model, whose stem is known."""
    source = zoo.create_model("mdeq_tiny")
    state = {original_name(key, segmenter=False): value for key, value in source.state_dict().items()}
    torch.save(state, tmp_path / "tiny.pkl")
    sizes = {"channels": (24, 24), "expansion": 5, "stem_stride": 1, "post_affine": False}
    model = segmenter(**sizes)
    zoo.load_backbone(model, tmp_path / "tiny.pkl")
    assert torch.equal(model.state_dict()["stem.0.weight"], source.state_dict()["stem.0.weight"])


def test_from_shipped_weights() -> None:
    source = zoo.load_pretrained("mdeq_nano.digits")
    sizes = {"channels": (16, 32), "expansion": 3, "stem_stride": 1, "post_affine": False, "in_channels": 1}
    model = segmenter(**sizes)
    zoo.load_backbone(model, "mdeq_nano.digits")
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model.eval().stem(x), source.stem(x))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"channels": (8, 16, 24)}, ["deq.cell.branches.2.conv1", "MDEQ has another stem or cell", "same channels"]),
        ({"post_affine": False}, ["6 keys are missing: 'deq.cell.post.0.2.weight'", "post_affine"]),
        ({"weight_norm": ("branches",)}, ["deq.cell.post.0.1.parametrizations", "weight_norm"]),
    ],
)
def test_another_cell_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    model = segmenter()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_backbone(model, classifier(**changes))
    assert all(part in str(error.value) for part in parts), error.value
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_without_a_head() -> None:
    with pytest.raises(ValueError, match=r"with a head, like MDEQSegmenter; given: TanhDEQ"):
        zoo.load_backbone(zoo.create_model("tanh_deq"), classifier())
