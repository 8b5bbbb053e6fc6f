"""The published optical flow sets, on small trees laid out like the real ones."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.flow import FlowDataModule
from datamodules.flying_chairs import FlyingChairsDataModule
from datamodules.flying_things import FlyingThings3DDataModule
from datamodules.hd1k import HD1KDataModule
from datamodules.idx import DataError
from datamodules.kitti_flow import KittiFlowDataModule
from datamodules.published_flow import read_flow_png
from datamodules.sintel import SintelDataModule
from tests.datamodules.loading import workers

H, W = 24, 40
CROP = {"crop_height": 16, "crop_width": 24, "num_workers": 0}
RNG = np.random.default_rng(0)


def image(path: Path, height: int = H, width: int = W) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def vectors() -> np.ndarray:
    """Flow ``(H, W, 2)`` in steps of 1/64, which all formats hold; one vector is none."""
    flow = RNG.integers(-640, 640, (H, W, 2)).astype("<f4") / 64
    flow[3, 5] = (0, 1e9)
    return flow


def flo(path: Path) -> None:
    """Middlebury's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PIEH" + struct.pack("<ii", W, H) + vectors().tobytes())


def pfm(path: Path) -> None:
    """Portable float map: three channels, the last row first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.concatenate([vectors(), np.zeros((H, W, 1), "<f4")], axis=2)[::-1]
    path.write_bytes(b"PF\n%d %d\n-1.0\n" % (W, H) + values.astype("<f4").tobytes())


def png16(path: Path) -> None:
    """KITTI's format: u, v and whether they are known in the channels of a PNG of 16 bits; some are not."""
    known = RNG.random((H, W, 1)) < 0.3
    known[3, 5] = False
    save_png16(path, np.concatenate([np.where(known, vectors() * 64 + 2**15, 0), known], axis=2))


def save_png16(path: Path, values: np.ndarray) -> None:
    """Colours of 16 bits ``(H, W, 3)``; each row of bytes has one of the five filters of ISO/IEC 15948 in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = values.shape
    x = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    a, b = np.pad(x, ((0, 0), (6, 0)))[:, :-6], np.pad(x, ((1, 0), (0, 0)))[:-1]  # left and above
    c = np.pad(b, ((0, 0), (6, 0)))[:, :-6]
    p = a + b - c
    to_a, to_b, to_c = abs(p - a), abs(p - b), abs(p - c)
    paeth = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    filtered = [x, x - a, x - b, x - (a + b) // 2, x - paeth]
    rows = [bytes([i % 5]) + (filtered[i % 5][i] % 256).astype(np.uint8).tobytes() for i in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    )


def chairs(root: Path) -> None:
    for i in range(1, 6):
        image(root / f"FlyingChairs/data/{i:05}_img1.ppm")
        image(root / f"FlyingChairs/data/{i:05}_img2.ppm")
        flo(root / f"FlyingChairs/data/{i:05}_flow.flo")
    (root / "FlyingChairs/FlyingChairs_train_val.txt").write_text("1\n2\n1\n1\n2\n")


def things(root: Path) -> None:
    folder = root / "FlyingThings3D"
    for part, scenes in (("TRAIN", ("A/0000", "B/0000")), ("TEST", ("A/0000",))):
        for scene in scenes:
            for i in range(6, 9):
                for render in ("frames_cleanpass", "frames_finalpass"):
                    image(folder / render / part / scene / f"left/{i:04}.png")
                for way, name in (("into_future", "IntoFuture"), ("into_past", "IntoPast")):
                    pfm(folder / "optical_flow" / part / scene / way / f"left/OpticalFlow{name}_{i:04}_L.pfm")


def sintel(root: Path) -> None:
    for scene in ("market_2", "alley_1"):
        for i in range(1, 4):
            for render in ("clean", "final"):
                image(root / "Sintel/training" / render / scene / f"frame_{i:04}.png")
        for i in range(1, 3):
            flo(root / "Sintel/training/flow" / scene / f"frame_{i:04}.flo")


def kitti(root: Path) -> None:
    for i in range(5):
        for frame in (10, 11):
            image(root / f"KittiFlow/training/image_2/{i:06}_{frame}.png")
        png16(root / f"KittiFlow/training/flow_occ/{i:06}_10.png")


def hd1k(root: Path) -> None:
    for sequence in (0, 35):
        for i in range(3):
            image(root / f"hd1k/hd1k_input/image_2/{sequence:06}_{i:04}.png")
            png16(root / f"hd1k/hd1k_flow_gt/flow_occ/{sequence:06}_{i:04}.png")


SETS = {
    FlyingChairsDataModule: chairs,
    FlyingThings3DDataModule: things,
    SintelDataModule: sintel,
    KittiFlowDataModule: kitti,
    HD1KDataModule: hd1k,
}
every_set = pytest.mark.parametrize("kind", SETS)

TRAINED = {
    FlyingChairsDataModule: 3,
    FlyingThings3DDataModule: 2 * 2 * 2 * 2,  # renders, directions, scenes, pairs
    SintelDataModule: 2 * 2 * 2,
    KittiFlowDataModule: 5,
    HD1KDataModule: 4,
}
EVALUATED = {
    FlyingChairsDataModule: 2,
    FlyingThings3DDataModule: 4,
    SintelDataModule: 4,
    KittiFlowDataModule: 5,
    HD1KDataModule: 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All five sets in one folder. Nobody writes there."""
    folder = tmp_path_factory.mktemp("flow")
    for write in SETS.values():
        write(folder)
    return folder


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


# ------------------------------------------------------------------------------------------------------- what is given


@every_set
@workers
def test_evaluation_gives_whole_pairs_one_by_one(kind, num_workers, root):
    module = kind(root=str(root), **{**CROP, "num_workers": num_workers})
    assert isinstance(module, FlowDataModule)
    batches = list(module.val_dataloader())
    assert len(batches) == EVALUATED[kind]
    for image1, image2, flow, valid in batches:
        assert image1.shape == image2.shape == (1, 3, H, W)
        assert flow.shape == (1, 2, H, W)
        assert (image1.dtype, flow.dtype, valid.dtype) == (torch.float32, torch.float32, torch.bool)
        assert valid.shape == (1, H, W)
        assert not valid[0, 3, 5], "longer than any true flow"
        assert float(valid.float().mean()) > (0.2 if kind in (KittiFlowDataModule, HD1KDataModule) else 0.99)
        assert bool((flow.movedim(1, -1)[~valid] == 0).all())
        assert float(flow.abs().max()) <= 10
    for loader in (module.test_dataloader(), module.predict_dataloader()):
        assert all(torch.equal(batch[2], again[2]) for batch, again in zip(loader, batches, strict=True))


@every_set
@workers
def test_training_pairs_follow_the_seed_and_are_new_in_every_epoch(kind, num_workers, root):
    torch.manual_seed(0)
    module, same = (kind(root=str(root), batch_size=2, **{**CROP, "num_workers": num_workers}) for _ in range(2))
    first, second = list(module.train_dataloader()), list(module.train_dataloader())
    again = list(same.train_dataloader())
    assert sum(len(batch[0]) for batch in first) == TRAINED[kind]
    for image1, image2, flow, valid in first:
        assert image1.shape[1:] == image2.shape[1:] == (3, 16, 24)
        assert flow.shape[1:] == (2, 16, 24)
        assert valid.shape[1:] == (16, 24)
        assert bool((flow.movedim(1, -1)[~valid] == 0).all())
    assert all(
        torch.equal(one, other) for a, b in zip(first, again, strict=True) for one, other in zip(a, b, strict=True)
    )
    images = torch.cat([batch[0] for batch in (*first, *second)]).flatten(1)
    assert len(images.unique(dim=0)) == 2 * TRAINED[kind]


def test_files_are_paired_as_published(root):
    """The first pair of each, and one backwards in time."""
    expected = {
        FlyingChairsDataModule: ("FlyingChairs/data/00002_img1.ppm", "FlyingChairs/data/00002_img2.ppm"),
        FlyingThings3DDataModule: tuple(f"FlyingThings3D/frames_finalpass/TEST/A/0000/left/{i:04}.png" for i in (6, 7)),
        KittiFlowDataModule: tuple(f"KittiFlow/training/image_2/000000_{i}.png" for i in (10, 11)),
        HD1KDataModule: tuple(f"hd1k/hd1k_input/image_2/000000_{i:04}.png" for i in (0, 1)),
    }
    for kind, names in expected.items():
        image1, image2, *_ = kind(root=str(root)).splits.val[0]
        assert torch.equal(image1, pixels(root / names[0])), kind
        assert torch.equal(image2, pixels(root / names[1])), kind
    backwards, *_, flow, _ = FlyingThings3DDataModule(root=str(root), render="clean").splits.test[2]
    assert torch.equal(backwards, pixels(root / "FlyingThings3D/frames_cleanpass/TEST/A/0000/left/0007.png"))
    file = root / "FlyingThings3D/optical_flow/TEST/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm"
    values = np.frombuffer(file.read_bytes()[-H * W * 12 :], "<f4").reshape(H, W, 3)[::-1, :, :2]
    values = np.where(np.abs(values).max(axis=2, keepdims=True) < 1000, values, 0)
    np.testing.assert_array_equal(flow, values.transpose(2, 0, 1))


def test_the_flow_is_that_of_the_file(root):
    _, _, flow, valid = FlyingChairsDataModule(root=str(root)).splits.val[1]
    content = (root / "FlyingChairs/data/00005_flow.flo").read_bytes()[12:]
    values = torch.from_numpy(np.frombuffer(content, "<f4").reshape(H, W, 2).transpose(2, 0, 1).copy())
    assert torch.equal(flow[:, valid], values[:, valid])
    assert int((~valid).sum()) == 1


@given(height=st.integers(1, 30), width=st.integers(1, 30), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_all_16_bits_of_a_flow_png_are_read(height, width, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("png") / "flow.png"
    values = np.random.default_rng(seed).integers(0, 2**16, (height, width, 3))
    values[..., 2] %= 2
    save_png16(path, values)
    flow, valid = read_flow_png(str(path))
    np.testing.assert_array_equal(flow.permute(1, 2, 0), (values[..., :2] - 2.0**15) / 64)
    np.testing.assert_array_equal(valid, values[..., 2] == 1)


def test_a_flow_png_of_8_bits_is_refused(tmp_path):
    kitti(tmp_path)
    image(tmp_path / "KittiFlow/training/flow_occ/000000_10.png")
    with pytest.raises(
        DataError, match=r"000000_10.png is corrupt: .* of the kind RGB; expected: three channels of 16"
    ):
        _ = KittiFlowDataModule(root=str(tmp_path)).splits.val[0]


@pytest.mark.parametrize("render", ["clean", "final"])
def test_sintel_is_tested_in_one_render(render, root):
    val = SintelDataModule(root=str(root), render=render).splits.val
    shown = {pixels(path).sum().item() for path in (root / "Sintel/training" / render).rglob("frame_000[12].png")}
    assert {val[i][0].sum().item() for i in range(len(val))} == shown


def test_the_mixture_of_sintels_stage(root):
    folder = str(root)
    module = SintelDataModule(folder, folder, folder, folder, **CROP)
    module.setup("fit")
    assert len(module.splits.train) == 100 * 4 + 100 * 4 + 200 * 5 + 5 * 4 + 8
    given = [module.splits.train[i] for i in (0, 799, 800, 807, 808, 1808, 1827)]
    assert {tuple(pair[2].shape) for pair in given} == {(2, 16, 24)}
    assert len(SintelDataModule(folder, things_root=folder, **CROP).splits.train) == 808


def test_parts_of_the_mixture_that_are_left_out_are_said(root):
    module = SintelDataModule(str(root), kitti_root=str(root), **CROP)
    with pytest.warns(UserWarning, match=r"without things_root, hd1k_root: .* --data.things_root FOLDER"):
        module.setup("fit")
    module.setup("test")  # and says nothing where nothing is trained
    assert len(module.splits.train) == 800 + 200 * 5


@pytest.mark.parametrize(("kind", "kept"), [(KittiFlowDataModule, 3), (HD1KDataModule, 2)])
def test_held_out_pairs_are_not_trained_on(kind, kept, root):
    whole = kind(root=str(root)).splits
    parts = kind(root=str(root), held_out=0.4).splits
    assert len(parts.train) == kept
    assert len(parts.val) == len(parts.test) == len(whole.val) - kept
    assert torch.equal(parts.val[0][0], whole.val[kept][0])
    assert len(kind(root=str(root), held_out=0.01).splits.val) == 1
    for fraction in (-0.1, 0.99, 1.0):
        with pytest.raises(ValueError, match=r"held_out is the fraction of the . pairs that are not trained on"):
            kind(root=str(root), held_out=fraction).setup()


def test_images_of_any_size_are_tested(tmp_path):
    for i, (height, width) in enumerate([(H, W), (H, W + 3)]):
        for frame in (10, 11):
            image(tmp_path / f"KittiFlow/training/image_2/{i:06}_{frame}.png", height, width)
        png16(tmp_path / f"KittiFlow/training/flow_occ/{i:06}_10.png")
    loader = iter(KittiFlowDataModule(root=str(tmp_path), num_workers=0).test_dataloader())
    assert next(loader)[0].shape == (1, 3, H, W)
    with pytest.raises(
        DataError, match=r"000001_10.png is corrupt: its size is \(2, 24, 40\); expected: \(2, 24, 43\)"
    ):
        next(loader)


@every_set
def test_the_arguments_are_plain_enough_for_a_command_line(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FlowDataModule, "data")
    name = f"{kind.__module__}.{kind.__name__}"
    module = parser.instantiate(parser.parse_args([f"--data={name}", "--data.crop_height=100"])).data
    assert type(module) is kind
    assert (module.changes.height, module.hparams.crop_height, module.eval_batch_size) == (100, 100, 1)


def test_the_published_crops_and_magnifications():
    def changes(kind) -> tuple[float, ...]:
        found = kind().changes
        return found.height, found.width, found.min_scale, found.max_scale, found.flip

    assert changes(FlyingChairsDataModule) == (368, 496, -0.1, 1.0, True)
    assert changes(FlyingThings3DDataModule) == (400, 720, -0.4, 0.8, True)
    assert changes(SintelDataModule) == (368, 768, -0.2, 0.6, True)
    assert changes(KittiFlowDataModule) == (288, 960, -0.2, 0.4, False)
    assert changes(HD1KDataModule) == (368, 768, -0.5, 0.2, True)


# ------------------------------------------------------------------------------------------- what is missing or broken


@every_set
def test_a_set_that_is_not_there_is_one_clear_error(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"was not found in {tmp_path}") as caught:
        kind(root=str(tmp_path)).setup("fit")
    text = str(caught.value)
    layout = {KittiFlowDataModule: "KittiFlow/training/flow_occ", HD1KDataModule: "hd1k/hd1k_flow_gt"}
    assert layout.get(kind, kind.__name__.removesuffix("DataModule") + "/") in text
    assert "Get it from http" in text
    assert "--data.root" in text


@pytest.mark.parametrize(
    ("kind", "gone", "error"),
    [
        (FlyingChairsDataModule, "FlyingChairs/FlyingChairs_train_val.txt", FileNotFoundError),
        (FlyingChairsDataModule, "FlyingChairs/data/00005_img2.ppm", FileNotFoundError),
        (FlyingChairsDataModule, "FlyingChairs/data/00003_flow.flo", DataError),
        (FlyingThings3DDataModule, "FlyingThings3D/frames_finalpass/TEST/A/0000/left/0008.png", FileNotFoundError),
        (FlyingThings3DDataModule, "FlyingThings3D/frames_cleanpass/TRAIN/A/0000/left/0007.png", FileNotFoundError),
        (SintelDataModule, "Sintel/training/flow/alley_1/frame_0002.flo", DataError),
        (SintelDataModule, "Sintel/training/final/alley_1/frame_0001.png", DataError),
        (KittiFlowDataModule, "KittiFlow/training/flow_occ/000002_10.png", DataError),
        (KittiFlowDataModule, "KittiFlow/training/image_2/000002_11.png", DataError),
        (HD1KDataModule, "hd1k/hd1k_input/image_2/000035_0000.png", FileNotFoundError),
        (HD1KDataModule, "hd1k/hd1k_flow_gt/flow_occ/000000_0000.png", DataError),
    ],
)
def test_a_missing_file_never_pairs_strangers(kind, gone, error, tmp_path):
    SETS[kind](tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(error, match=r"was not found|do not belong together|files are missing"):
        kind(root=str(tmp_path)).setup("fit")


def test_a_list_of_chairs_that_is_damaged(tmp_path):
    chairs(tmp_path)
    for text in ("1\n2\n", "one\n"):
        (tmp_path / "FlyingChairs/FlyingChairs_train_val.txt").write_text(text)
        with pytest.raises(FileNotFoundError, match=r"FlyingChairs was not found in .*, or not all of it"):
            FlyingChairsDataModule(root=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (FlyingChairsDataModule, "FlyingChairs/data/00002_flow.flo"),
        (FlyingChairsDataModule, "FlyingChairs/data/00002_img2.ppm"),
        (
            FlyingThings3DDataModule,
            "FlyingThings3D/optical_flow/TEST/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm",
        ),
        (KittiFlowDataModule, "KittiFlow/training/flow_occ/000000_10.png"),
        (HD1KDataModule, "hd1k/hd1k_input/image_2/000000_0001.png"),
    ],
)
@pytest.mark.parametrize("length", [30, 200])
def test_a_damaged_file_is_named(kind, name, length, tmp_path):
    SETS[kind](tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="is corrupt: it does not open as") as caught:
        next(iter(kind(root=str(tmp_path), num_workers=0).val_dataloader()))
    assert str(caught.value).startswith(str(path))


def test_images_of_two_sizes_are_named(tmp_path):
    chairs(tmp_path)
    path = tmp_path / "FlyingChairs/data/00002_img2.ppm"
    image(path, H, W + 1)
    with pytest.raises(
        DataError, match=r"its size is \(3, 24, 41\); expected: \(3, 24, 40\), as .*00002_img1.ppm"
    ) as caught:
        next(iter(FlyingChairsDataModule(root=str(tmp_path), num_workers=0).val_dataloader()))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("kind", [SintelDataModule, FlyingThings3DDataModule])
def test_an_unknown_render(kind):
    with pytest.raises(ValueError, match="render is 'clean' or 'final'; given: 'albedo'"):
        kind(render="albedo")
