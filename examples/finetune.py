"""Fine-tune pretrained weights on another task: the digits, now in five classes (0-1, 2-3, 4-5, 6-7, 8-9).

python examples/finetune.py
"""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier


class Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Any data set of (image, label) will do; this one halves the labels of another."""

    def __init__(self, digits: Dataset[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.digits = digits

    def __len__(self) -> int:
        return len(self.digits)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.digits[i]
        return image, label // 2


if __name__ == "__main__":
    pl.seed_everything(0)
    digits = DigitsDataModule().splits
    few = Subset(Pairs(digits.train), range(200))
    module = ImageClassifier("tanh_deq", num_classes=5, pretrained="tanh_deq.digits", lr=3e-3)
    trainer = pl.Trainer(max_epochs=20, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(module, DataLoader(few, batch_size=20, shuffle=True), DataLoader(Pairs(digits.val), batch_size=180))
    trainer.test(module, DataLoader(Pairs(digits.test), batch_size=360))
