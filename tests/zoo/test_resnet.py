"""The explicit baseline: its shapes, its size, its input, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo


def test_shapes_and_blocks() -> None:
    model = zoo.ResNet(widths=(4, 6, 8), blocks=2, num_classes=3, in_channels=2).eval()
    assert model(torch.rand(5, 2, 9, 12)).shape == (5, 3)
    assert [len(stage) for stage in model.stages] == [2, 2, 2]
    features = model.stages(model.stem(torch.rand(1, 2, 8, 12)))
    assert features.shape == (1, 8, 2, 3)  # each stage but the first halves it


def test_the_baseline_has_as_many_parameters_as_the_equilibrium_model() -> None:
    count = {
        name: sum(p.numel() for p in zoo.create_model(name, **arguments).parameters())
        for name, arguments in {"mdeq_nano": {}, "resnet": {"widths": [19, 38, 77], "in_channels": 1}}.items()
    }
    assert abs(count["resnet"] / count["mdeq_nano"] - 1) < 0.02


def test_the_model_normalises() -> None:
    torch.manual_seed(0)
    model = zoo.ResNet(in_channels=1, mean=0.3, std=0.5).eval()
    plain = zoo.ResNet(in_channels=1).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), plain((x - 0.3) / 0.5))


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 8, 8), torch.zeros(8, 8), torch.zeros(1, 1, 8, 8).byte()])
def test_images_that_do_not_fit(image: torch.Tensor) -> None:
    with pytest.raises(zoo.InputError, match=r"floating images \(B, 1, H, W\).*given: torch\."):
        zoo.ResNet(in_channels=1)(image)


@pytest.mark.parametrize(
    "arguments", [{"widths": ()}, {"widths": (0,)}, {"blocks": 0}, {"num_classes": 0}, {"std": 0.0}]
)
def test_sizes_that_make_no_sense(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"ResNet takes .*{name}="):
        zoo.ResNet(**arguments)
