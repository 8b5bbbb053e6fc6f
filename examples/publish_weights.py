"""Turn a Lightning checkpoint into weights of the zoo: a safetensors file, its record, and the table of all weights.

python examples/publish_weights.py runs/published/version_0/checkpoints/best.ckpt tanh_deq.digits

The recorded metric is measured on the file that was written, read back as a user would read it.
"""

import sys

import torch

import zoo
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from zoo.weights import WeightsRecord, save_record, sha256_of, write_table


def main(checkpoint: str, name: str) -> None:
    """Publish ``checkpoint`` under ``name``, ``"arch.tag"``."""
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
        preprocessing="images (B, 1, 8, 8) with values in [0, 1], that is scikit-learn's pixels / 16; the model normalises",
        classes=list(data.class_names),
    )
    save_record(draft)
    metrics = {f"{part}_accuracy": accuracy(name, getattr(data.splits, part)) for part in ("val", "test")}
    record = WeightsRecord(**{**vars(draft), "metrics": metrics})
    print(f"Wrote {path}, {save_record(record)} and {write_table()}: {metrics}")


def accuracy(name: str, dataset: torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The fraction of the data set that the published weights get right."""
    images, labels = map(torch.stack, zip(*(dataset[i] for i in range(len(dataset))), strict=True))  # type: ignore[arg-type]
    with torch.no_grad():
        prediction = zoo.load_pretrained(name)(images).argmax(dim=1)
    return int((prediction == labels).sum()) / len(labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
