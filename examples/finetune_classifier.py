"""Fine-tune a pretrained classifier on your images: a folder of folders, one a class.

python examples/finetune_classifier.py [FOLDER]     # FOLDER/cat/1.png, FOLDER/cat/2.png, FOLDER/dog/1.png, ...

Without FOLDER: the digits, in five classes (0-1, 2-3, 4-5, 6-7, 8-9), 200 of them to train on.
The equilibrium stays as it was trained; with more images, unfreeze it, at a smaller lr.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import zoo
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier

MODEL, WEIGHTS, FREEZE = "mdeq_nano", "mdeq_nano.digits", ["deq.*"]
SIZE = 32  # the side of an image from FOLDER, in pixels


def images_of(folder: str) -> tuple[Any, Any, int]:
    """Images to train on, a fifth of them to test with, and how many classes they have."""
    prepare = v2.Compose([v2.Grayscale(), v2.Resize((SIZE, SIZE)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    try:
        images = ImageFolder(folder, prepare)
    except FileNotFoundError as error:
        raise SystemExit(f"error: FOLDER has a folder of images for each class; given: {folder}. {error}") from None
    if len(images) < 5:
        raise SystemExit(f"error: {folder} has {len(images)} images: too few to train on, and to test with a fifth")
    train, test = random_split(images, (0.8, 0.2), torch.Generator().manual_seed(0))
    return train, test, len(images.classes)


def digits() -> tuple[Any, Any, int]:
    """The same of the digits in five classes."""
    parts = DigitsDataModule().splits
    train, test = (TensorDataset(part.images / 16, part.labels // 2) for part in (parts.train, parts.test))
    return Subset(train, range(200)), test, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="finetuned_classifier.safetensors", help="the file that is written")
    given = parser.parse_args()

    pl.seed_everything(0)
    train, test, classes = digits() if given.folder is None else images_of(given.folder)
    module = ImageClassifier(MODEL, num_classes=classes, pretrained=WEIGHTS, freeze=FREEZE, lr=1e-2)
    trainer = pl.Trainer(max_epochs=given.epochs, logger=False, enable_checkpointing=False, limit_val_batches=0)
    loader = DataLoader(test, batch_size=64)
    (before,) = trainer.test(module, loader, verbose=False)
    trainer.fit(module, DataLoader(train, batch_size=min(20, len(train)), shuffle=True, drop_last=True), loader)
    (after,) = trainer.test(module, loader, verbose=False)
    zoo.save_weights(module.model, given.out)
    print(f"Wrote {given.out}; model = zoo.load_pretrained({given.out!r}) brings it back")
    print(f"accuracy on {len(test)} other images: {before['test/accuracy']:.3f}, now {after['test/accuracy']:.3f}")


if __name__ == "__main__":
    main()
