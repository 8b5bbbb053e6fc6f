"""Fine-tune a pretrained segmenter on your images and their masks.

python examples/finetune_segmenter.py [FOLDER]     # FOLDER/images/1.jpg and FOLDER/masks/1.png, ...

A mask is an image of as many pixels, whose values are classes 0, 1, 2, ...; 255 does not count.
Without FOLDER: scenes of digits, in three classes: background, even digits and odd ones.
Stem and equilibrium stay as they were trained; with more images, unfreeze them, at a smaller lr.
"""

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision.transforms.v2 import functional as F

import zoo
from datamodules import DigitScenesDataModule
from datamodules.files import read_image
from lightning_modules import SemanticSegmenter

MODEL, WEIGHTS, FREEZE = "mdeq_nano_scenes", "mdeq_nano_scenes.digit_scenes", ["stem.*", "deq.*"]
SIZE, IGNORED = 96, 255  # the side of an image from FOLDER, in pixels


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """``(image float32 (1, S, S) in [0, 1], mask int64 (S, S))`` for each file of FOLDER/images."""

    def __init__(self, folder: str) -> None:
        self.images = sorted(path for path in Path(folder, "images").glob("*") if path.is_file())
        self.masks = [Path(folder, "masks", f"{path.stem}.png") for path in self.images]
        missing = [str(path) for path in self.masks if not path.is_file()]
        if len(self.images) < 5 or missing:
            raise SystemExit(
                f"error: FOLDER has images/NAME.jpg (or .png, ...) and masks/NAME.png, five or more; given: {folder}, "
                f"with {len(self.images)} images; missing: {', '.join(missing[:3]) or 'no mask'}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = F.pil_to_tensor(read_image(str(self.images[i]), "L")).float() / 255
        mask = F.pil_to_tensor(read_image(str(self.masks[i]))).long()
        small = F.resize(mask, [SIZE, SIZE], F.InterpolationMode.NEAREST)
        return F.resize(image, [SIZE, SIZE]).clamp(0, 1), small[0]


class Parity(Dataset[tuple[Tensor, Tensor]]):
    """Scenes of digits, in three classes. Any data set of (image, mask) will do."""

    def __init__(self, scenes: Dataset[tuple[Tensor, Tensor]]) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = self.scenes[i]  # 0 is background, a digit is itself plus 1
        return image, torch.where((mask == 0) | (mask == IGNORED), mask, 1 + (mask - 1) % 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="finetuned_segmenter.safetensors", help="the file that is written")
    given = parser.parse_args()

    pl.seed_everything(0)
    train: Any
    test: Any
    if given.folder is None:
        scenes = DigitScenesDataModule(train_size=128, test_size=32).splits
        train, test, classes = Parity(scenes.train), Parity(scenes.test), 3
    else:
        pairs = Masked(given.folder)
        classes = 1 + max(
            int(mask[mask != IGNORED].max(initial=0)) for mask in (pairs[i][1].numpy() for i in range(len(pairs)))
        )
        train, test = random_split(pairs, (0.8, 0.2), torch.Generator().manual_seed(0))
    module = SemanticSegmenter(MODEL, num_classes=classes, pretrained=WEIGHTS, freeze=FREEZE, lr=3e-2)
    trainer = pl.Trainer(max_epochs=given.epochs, logger=False, enable_checkpointing=False, limit_val_batches=0)
    loader = DataLoader(test, batch_size=16)
    (before,) = trainer.test(module, loader, verbose=False)
    trainer.fit(module, DataLoader(train, batch_size=min(16, len(train)), shuffle=True, drop_last=True), loader)
    (after,) = trainer.test(module, loader, verbose=False)
    zoo.save_weights(module.model, given.out)
    print(f"Wrote {given.out}; model = zoo.load_pretrained({given.out!r}) brings it back")
    print(f"mean IoU on {len(test)} other images: {before['test/miou']:.3f}, now {after['test/miou']:.3f}")


if __name__ == "__main__":
    main()
