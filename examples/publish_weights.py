"""Turn a Lightning checkpoint into weights of the zoo: a safetensors file, its record, and the table of all weights.

python examples/publish_weights.py runs/published/version_0/checkpoints/best.ckpt

What the record says about the data is written here, so other weights than tanh_deq.digits need a script of their own.

The recorded metric is measured on the file that was written, read back as a user would read it.
"""

import sys
from collections.abc import Iterable

import torch

import zoo
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from zoo.weights import WeightsRecord, save_record, sha256_of, write_table

NAME = "tanh_deq.digits"


def main(checkpoint: str, name: str = NAME) -> None:
    """Publish ``checkpoint``, a run of configs/tanh_deq_digits.yaml."""
    module = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    model = module.model.eval()
    path = zoo.weights.weights_dir() / f"{name}.safetensors"
    spec = zoo.save_weights(model, path)
    data = DigitsDataModule()
    draft = WeightsRecord(
        name=name,
        model=spec.model,
        arguments=spec.arguments,
        source="shipped",
        sha256=sha256_of(path.read_bytes()),
        num_parameters=sum(p.numel() for p in model.parameters()),
        trained_on="scikit-learn digits: 1,257 training images of the fixed split in datamodules/digits.py",
        recipe="make weights",
        metrics={},
        licence="MIT",
        preprocessing="images (B, 1, 8, 8) in [0, 1], that is scikit-learn's pixels / 16; the model normalises",
        classes=list(data.class_names),
    )
    save_record(draft)
    loaders = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    metrics = {f"{part}_accuracy": accuracy(name, loader) for part, loader in loaders.items()}
    record = WeightsRecord(**{**vars(draft), "metrics": metrics})
    print(f"Wrote {path}, {save_record(record)} and {write_table()}: {metrics}")


@torch.no_grad()
def accuracy(name: str, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The fraction of the samples that the published weights get right."""
    model = zoo.load_pretrained(name)
    hits = torch.cat([model(image).argmax(dim=1) == label for image, label in loader])
    return int(hits.sum()) / hits.numel()


if __name__ == "__main__":
    main(*sys.argv[1:])
