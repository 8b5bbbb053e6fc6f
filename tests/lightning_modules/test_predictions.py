"""PredictionWriter: flow in files, by name, batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets._optical_flow import _read_16bits_png_with_flow_and_valid_mask, _read_flo

from lightning_modules import PredictionWriter
from lightning_modules.flow_files import colour_picture
from tests.command_line import rows, said
from tests.lightning_modules.flows import pairs, small
from tests.lightning_modules.runs import trainer

# torchvision's reader of KITTI's files is its own deprecated decoder of images.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


class Named(pl.LightningDataModule):
    """Three pairs, with names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def predict_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*pairs(3).tensors[:2]), batch_size=2)


def expected() -> Tensor:
    with torch.no_grad():
        flow: Tensor = small().eval()(*pairs(3).tensors[:2])
    return flow


def test_flow_is_written_with_pictures(tmp_path: Path) -> None:
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    with said() as messages:
        run.predict(small(), DataLoader(pairs(3), batch_size=2))
    assert f"Wrote 3 predictions to {tmp_path / 'predictions.csv'}" in messages
    table = rows(tmp_path / "predictions.csv")
    assert list(table[0]) == ["index", "flow", "flow_picture", "flow_longest"]
    assert [row["flow"] for row in table] == [f"flow/{index:06d}.flo" for index in range(3)]
    for row, flow in zip(table, expected(), strict=True):
        np.testing.assert_allclose(_read_flo(str(tmp_path / row["flow"])), flow.numpy(), rtol=1e-4, atol=1e-4)
        assert float(row["flow_longest"]) == pytest.approx(flow.norm(dim=0).max().item(), rel=1e-4)
        written = torch.from_numpy(_read_flo(str(tmp_path / row["flow"])))
        with Image.open(tmp_path / row["flow_picture"]) as png:
            assert np.array_equal(np.asarray(png), colour_picture(written).permute(1, 2, 0).numpy())


def test_kittis_format(tmp_path: Path) -> None:
    run = trainer(PredictionWriter(flow_format="kitti"), default_root_dir=tmp_path)
    run.predict(small(), DataLoader(pairs(3), batch_size=2))
    for row, flow in zip(rows(tmp_path / "predictions.csv"), expected(), strict=True):
        found, valid = _read_16bits_png_with_flow_and_valid_mask(str(tmp_path / row["flow"]))
        assert np.abs(found - flow.numpy()).max() <= 1 / 128 + 1e-4
        assert valid.all()
        assert (tmp_path / row["flow_picture"]).is_file()


def test_files_have_the_names_of_the_data(tmp_path: Path) -> None:
    """Folders too."""
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    run.predict(small(), datamodule=Named("alley/frame_1", "alley/frame_2", "market/frame_1"))
    table = rows(tmp_path / "predictions.csv")
    assert [(row["index"], row["name"]) for row in table][2] == ("2", "market/frame_1")
    found = torch.from_numpy(_read_flo(str(tmp_path / "flow" / "alley" / "frame_2.flo")))
    torch.testing.assert_close(found, expected()[1], rtol=1e-4, atol=1e-4)
    assert table[1]["flow_picture"] == "flow_picture/alley/frame_2.png"


def test_names_that_occur_twice_would_overwrite_each_other(tmp_path: Path) -> None:
    run = trainer(PredictionWriter(), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="called by the names of the data, and some of these occur twice"):
        run.predict(small(), datamodule=Named("one", "two", "one"))


def test_batches_are_written_as_they_come_and_not_kept(tmp_path: Path) -> None:
    """While a batch is computed, those before are on disk, and nowhere else."""
    seen: list[tuple[int, int]] = []

    class Watch(pl.Callback):
        def on_predict_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            files = len(list(tmp_path.rglob("*.flo")))
            assert len(rows(tmp_path / "predictions.csv")) == files
            seen.append((files, sum(map(len, trainer.predict_loop._predictions))))

    run = trainer(PredictionWriter(), Watch(), default_root_dir=tmp_path)
    run.predict(small(), DataLoader(pairs(3), batch_size=1), return_predictions=False)
    assert seen == [(0, 0), (1, 0), (2, 0)]
    again = trainer(PredictionWriter(), default_root_dir=tmp_path)
    again.predict(small(), DataLoader(pairs(1), batch_size=1), return_predictions=False)
    assert len(rows(tmp_path / "predictions.csv")) == 1, "a second table takes the place of the first"


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="flow_format takes 'flo' or 'kitti'; given: 'png'"):
        PredictionWriter(flow_format="png")  # type: ignore[arg-type]
