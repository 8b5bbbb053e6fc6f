"""Draw what a model of optical flow finds: first image, second image, true flow, its flow, side by side.

python examples/draw_flow.py docs/flow.png
"""

import sys
from pathlib import Path
from typing import Any

import torch

import zoo
from datamodules import SyntheticFlowDataModule
from lightning_modules.flow_files import comparison
from lightning_modules.png import write_png

WEIGHTS, SAMPLES, LARGER = "deq_flow_nano.synthetic", 4, 2


def main(path: str) -> None:
    """Write a PNG file of the first test pairs; both flows of a pair are on one scale of colours."""
    model: Any = zoo.load_pretrained(WEIGHTS)
    data = SyntheticFlowDataModule(batch_size=SAMPLES, height=96, width=128)
    image1, image2, target, *_ = next(iter(data.test_dataloader()))
    with torch.no_grad():
        flow = model(image1, image2)
    drawn = comparison(image1, target, flow, SAMPLES)
    second = (255 * image2[:SAMPLES]).round().to(torch.uint8)
    width = image1.shape[3]
    picture = torch.cat([drawn[:, :, :width], torch.cat(list(second), dim=1), drawn[:, :, width:]], dim=2)
    write_png(Path(path), picture.repeat_interleave(LARGER, 1).repeat_interleave(LARGER, 2))
    errors = (flow - target).norm(dim=1).mean(dim=(1, 2))
    print(f"Wrote {path}: EPE {', '.join(f'{error:.2f}' for error in errors)} pixels; {model.deq.report.summary()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
