"""Train the convolutional model of the benchmark once: ``python -m benchmarks.train_conv``.

z = x + conv(relu(norm(conv z))) on scikit-learn's digits: 600 steps with implicit gradients and a Jacobian penalty.
The weights, and the 16 test digits on which the benchmark solves, are committed as ``benchmarks/conv.safetensors``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from datamodules import DigitsDataModule
from datamodules.image import ImageDataset
from zoo.implicit import DEQ, Anderson, ImplicitGradient, jacobian_penalty

from .problems import CONV_WEIGHTS, ConvClassifier, conv, spectral_radii


def train(steps: int = 600, batch: int = 32, jacobian_weight: float = 3.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """The trained model's tensors, and ``images (16, 1, 8, 8)`` and ``labels (16,)`` of the test set."""
    torch.manual_seed(seed)
    splits = DigitsDataModule().splits
    images, labels = _whole(splits.train)
    model = ConvClassifier()
    deq = DEQ(model.cell, Anderson(tol=1e-3), ImplicitGradient(Anderson(tol=1e-3)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,))
        x = model.encode(images[rows])
        z, report = deq(x)
        loss = nn.functional.cross_entropy(model.classify(z), labels[rows])
        penalty = jacobian_penalty(model.cell, z, x).mean()
        optimizer.zero_grad()
        (loss + jacobian_weight * penalty).backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step:4}  loss {loss:.3f}  penalty {penalty:.3f}  evaluations {report.evaluations}", flush=True
            )

    test_images, test_labels = _whole(splits.test)
    with torch.no_grad():
        z, _ = deq(model.encode(test_images))
        accuracy = (model.classify(z).argmax(dim=1) == test_labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")
    return {
        **{name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "images": test_images[:16].clone(),
        "labels": test_labels[:16].clone(),
    }


def _whole(dataset: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.stack(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CONV_WEIGHTS, help="where the weights go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    save_file(train(), arguments.out)
    radii = spectral_radii(conv())
    print(f"spectral radius {radii.min():.3f} to {radii.max():.3f}")


if __name__ == "__main__":
    main()
