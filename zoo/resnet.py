"""A residual network of any small size: what the equilibrium models are compared with.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), built from torchvision's blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from .errors import InputError
from .registry import register_model


class ResNet(nn.Module):
    """Explicit layers only: a 3x3 convolution, stages of basic blocks, average pooling, a linear layer.

    torchvision's own constructor fixes the widths 64 to 512, too many for the small sets here.

    Args:
        widths: channels of the stages; each but the first halves the resolution.
        blocks: basic blocks a stage.
        num_classes: outputs.
        in_channels: channels of the image.
        mean, std: the model normalises its input itself, to (x - mean) / std.

    Shape:
        images ``(B, in_channels, H, W)`` with values in [0, 1] -> logits ``(B, num_classes)``.

    Raises:
        ValueError: an argument is not as described.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        widths: Sequence[int] = (16, 32),
        blocks: int = 1,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        if not widths or min(*widths, blocks, num_classes, in_channels) < 1 or not std > 0:
            raise ValueError(
                "ResNet takes integers >= 1 for widths, blocks, num_classes and in_channels, and std > 0; given: "
                f"widths={widths!r}, blocks={blocks!r}, num_classes={num_classes!r}, in_channels={in_channels!r}, "
                f"std={std!r}"
            )
        self.in_channels = in_channels
        self.mean = mean
        self.std = std
        C = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU())
        stages = [(C, C, 1), *((a, b, 2) for a, b in itertools.pairwise(widths))]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_block(a, b, stride), *(_block(b, b, 1) for _ in range(blocks - 1)))
                for a, b, stride in stages
            )
        )
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes)``.

        Raises:
            InputError: the image is not floating, or has another number of channels.
        """
        if not image.is_floating_point() or image.dim() != 4 or image.shape[1] != self.in_channels:
            raise InputError(
                f"this ResNet takes floating images (B, {self.in_channels}, H, W) in [0, 1]; "
                f"given: {image.dtype}, shape {tuple(image.shape)}"
            )
        features = self.stages(self.stem((image - self.mean) / self.std))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock  # here: its import takes as long as torch's own

    shortcut = None
    if stride > 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    block: nn.Module = BasicBlock(in_channels, out_channels, stride, shortcut)
    return block


register_model("resnet", ResNet)
