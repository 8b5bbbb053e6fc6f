"""Fine-tune pretrained optical flow on your pairs of images whose flow is known.

python examples/finetune_flow.py [FOLDER]     # FOLDER/1_img1.png, FOLDER/1_img2.png, FOLDER/1_flow.flo, ...

The flow is a Middlebury file (.flo), or a PNG file of 16 bits as KITTI has it (NAME_flow.png), which also says where
it is known. Without FOLDER: layers of photographs whose shifts are twice as long as those of the weights' training.
The context encoder stays as it was trained.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import CenterCrop, RandomCrop
from torchvision.transforms.v2 import functional as F

import zoo
from datamodules import SyntheticFlowDataModule
from datamodules.files import read_rgb
from datamodules.published_flow import read_flow_png
from lightning_modules import OpticalFlow

MODEL, WEIGHTS, FREEZE = "deq_flow_nano", "deq_flow_nano.synthetic", ["context_encoder.*"]
HEIGHT, WIDTH = 64, 96  # of the part of a pair that is looked at, in pixels


def read_flo(path: Path) -> tuple[Tensor, Tensor]:
    """Flow ``(2, H, W)`` and where it is known ``(H, W)``: where it is shorter than a billion pixels."""
    _, width, height = np.fromfile(path, "<i4", 3)
    flow = torch.from_numpy(np.fromfile(path, "<f4", offset=12).reshape(height, width, 2)).permute(2, 0, 1)
    known = (flow.abs() < 1e9).all(dim=0)
    return flow.where(known, 0.0), known


class Pairs(Dataset[tuple[Tensor, ...]]):
    """``(image1, image2, flow, valid)`` of each NAME in FOLDER, cut to HEIGHT x WIDTH by ``cut``."""

    def __init__(self, folder: str, cut: nn.Module) -> None:
        self.cut = cut
        self.flows = sorted(path for path in Path(folder).glob("*_flow.*") if path.suffix in (".flo", ".png"))
        self.images = [[self._image(path, part) for part in ("img1", "img2")] for path in self.flows]
        if len(self.flows) < 5:
            raise SystemExit(
                f"error: FOLDER has NAME_img1.png, NAME_img2.png (or .jpg, .ppm, ...) and NAME_flow.flo or .png, five "
                f"or more; given: {folder}, with {len(self.flows)} files of flow"
            )

    @staticmethod
    def _image(flow: Path, part: str) -> Path:
        name = flow.name.replace("_flow", f"_{part}")
        found = sorted(flow.parent.glob(f"{Path(name).stem}.*"))
        if not found:
            raise SystemExit(f"error: beside {flow} there is no image {Path(name).stem}.png (or .jpg, .ppm, ...)")
        return found[0]

    def __len__(self) -> int:
        return len(self.flows)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        first, second = (F.pil_to_tensor(read_rgb(str(path))).float() / 255 for path in self.images[i])
        path = self.flows[i]
        flow, known = read_flow_png(str(path)) if path.suffix == ".png" else read_flo(path)
        whole = torch.cat([first, second, flow, known.unsqueeze(0).float()])
        cut: Tensor = self.cut(whole)  # what is padded is not known
        return cut[:3], cut[3:6], cut[6:8], cut[8] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="finetuned_flow.safetensors", help="the file that is written")
    given = parser.parse_args()

    pl.seed_everything(0)
    train: Any
    test: Any
    if given.folder is None:
        train, _, test = SyntheticFlowDataModule(height=HEIGHT, width=WIDTH, max_shift=16.0, test_size=32).splits
    else:
        train = Pairs(given.folder, RandomCrop((HEIGHT, WIDTH), pad_if_needed=True))
        test = Pairs(given.folder, CenterCrop((HEIGHT, WIDTH)))  # the same part of each, before and after
        fifth = max(len(test) // 5, 1)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()
        train, test = Subset(train, order[fifth:]), Subset(test, order[:fifth])
    module = OpticalFlow(MODEL, pretrained=WEIGHTS, freeze=FREEZE, losses=4, lr=5e-4, schedule="one_cycle")
    trainer = pl.Trainer(
        max_steps=given.steps, logger=False, enable_checkpointing=False, limit_val_batches=0, gradient_clip_val=1.0
    )
    loader = DataLoader(test, batch_size=8)
    (before,) = trainer.test(module, loader, verbose=False)
    trainer.fit(module, DataLoader(train, batch_size=min(4, len(train)), shuffle=True, drop_last=True), loader)
    (after,) = trainer.test(module, loader, verbose=False)
    zoo.save_weights(module.model, given.out)
    print(f"Wrote {given.out}; model = zoo.load_pretrained({given.out!r}) brings it back")
    print(
        f"EPE on {len(test)} other pairs, pixels: {before['test/epe']:.2f}, now {after['test/epe']:.2f}; "
        f"of no flow {after['test/epe_zero']:.2f}"
    )


if __name__ == "__main__":
    main()
