"""Segmentation of patches, and the readers of VOC's and the demo's masks that it stands on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.ops.evaluate.masks import MaskError, PartMasks, open_masks, under_patches
from gristmill.ops.evaluate.segmentation import (
    SegmentationError,
    SegmentationOptions,
    Tokens,
    confusion,
    constant_iou,
    enlarged,
    fit_linear,
    mean_iou,
    pixel_loss,
    reference_patches,
    run_segmentation,
)
from gristmill.ops.evaluate.subject import open_subject
from gristmill.ops.evaluate.voc import VocError, open_voc
from gristmill.shards.demo import MASKS, make_demo_images
from gristmill.shards.ingest import ingest_folder
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.metrics import jaccard_score

CLASSES = ("ground", "red", "green")
COLOURS = np.array([[120, 120, 120], [220, 30, 30], [30, 200, 40]])
QUICK = SegmentationOptions(side=32, steps=40, batch=4, rates=(1e-3, 3e-2), references=600)


class Colours:
    """A network that knows a patch's mean colour and nothing else."""

    size, stride, mean, std = 32, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, self.stride).permute(0, 2, 3, 1)


class Noise(Colours):
    """A network whose patches have nothing to do with the image, but are its own."""

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        shape = (len(images), images.shape[2] // 4, images.shape[3] // 4, 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(int(images.abs().sum() * 1e3)))


def draw_voc(root: Path, images: int = 12, seed: int = 0) -> Path:
    """Rectangles of two colours on grey, a border of ignored pixels around each; `train` and `val` halve the images."""
    draws = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    names = [f"2007_{number:06}" for number in range(images)]
    for name in names:
        mask = np.zeros((48, 64), np.uint8)
        for kind in (1, 2):
            top, left = draws.integers(0, 24), draws.integers(0, 20) + 32 * (kind - 1)
            mask[top : top + 22, left : left + 12] = 255
            mask[top + 1 : top + 21, left + 1 : left + 11] = kind
        pixels = COLOURS[np.where(mask == 255, 0, mask)] + draws.normal(0, 6, (48, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"JPEGImages/{name}.jpg", quality=95)
        palette = Image.fromarray(mask, mode="P")
        palette.putpalette([n for colour in range(256) for n in (colour, 255 - colour, 7 * colour % 256)])
        palette.save(root / f"SegmentationClass/{name}.png")
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("\n".join(names[::2]) + "\n")
    (lists / "val.txt").write_text("\n".join(names[1::2]) + "\n")
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_voc(tmp_path_factory.mktemp("voc") / "VOC2012")


def test_voc_is_read(voc: Path):
    train, above = open_voc(voc, "train"), open_voc(voc.parent, "train", limit=2)
    assert (len(train.keys), above.keys, train.classes) == (6, train.keys[:2], list(CLASSES))
    assert train.load(0).size == (64, 48)
    assert set(np.unique(train.mask(0))) == {0, 1, 2, 255}
    assert set(train.labels()) <= {1, 2}
    assert train.identity != open_voc(voc, "val").identity


def test_broken_voc_is_refused(tmp_path: Path):
    root = draw_voc(tmp_path / "voc", images=4)
    with pytest.raises(VocError, match=r"name one: train, val"):
        open_voc(root)
    with pytest.raises(VocError, match="not a VOC folder"):
        open_voc(root / "JPEGImages")
    masks = [root / f"SegmentationClass/2007_00000{number}.png" for number in (0, 2)]
    Image.open(masks[0]).convert("RGB").save(masks[0])
    with pytest.raises(VocError, match="mode RGB"):
        open_voc(root, "train").mask(0)
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(masks[0])
    with pytest.raises(VocError, match="shows class 9; known are 0 to 2"):
        open_voc(root, "train").mask(0)
    Image.fromarray(np.zeros((48, 60), np.uint8)).save(masks[0])
    with pytest.raises(VocError, match="60 x 48 pixels, its picture 64 x 48"):
        open_voc(root, "train").mask(0)
    masks[0].write_bytes(masks[1].read_bytes()[:150])
    with pytest.raises(VocError, match="cannot be read as a mask"):
        open_voc(root, "train").mask(0)
    masks[1].unlink()
    with pytest.raises(VocError, match=r"2007_000002\.png is not there"):
        open_voc(root, "train")


def test_a_layout_without_masks_is_refused(tmp_path: Path):
    with pytest.raises(MaskError, match="has no masks of pixels"):
        open_masks(tmp_path)


def test_the_demos_masks_lie_beside_its_shards(tmp_path: Path):
    make_demo_images(tmp_path / "images", images=32, instances=1, size=32)
    ingest_folder(tmp_path / "images", tmp_path / "data", holdout=0.5)
    (tmp_path / "images" / MASKS).rename(tmp_path / "data" / "parts.npz")
    with np.load(tmp_path / "data" / "parts.npz", allow_pickle=False) as side:
        paths, parts = dict(zip(side["key"].tolist(), side["path"].tolist(), strict=True)), side["mask"]
        rows = {key: row for row, key in enumerate(side["key"].tolist())}
    train, query = (open_masks(tmp_path / "data" / part) for part in ("train", "probe"))
    assert len(train.keys) + len(query.keys) == 32
    for row, key in enumerate(query.keys):
        cloth, patch = Path(paths[key]).parts[:2]
        named = np.array(query.classes)[query.mask(row)]
        assert ((named == cloth) == (parts[rows[key]] == 0)).all()
        assert set(named.ravel()) == {cloth, patch}
        original = Image.open(tmp_path / "images" / paths[key]).convert("RGB")
        assert (np.asarray(query.load(row)) == np.asarray(original)).all()
    found = run_segmentation(Colours(), train, query, seed=0, options=QUICK)
    assert found["segmentation_knn_miou"] > found["segmentation_chance"]


def test_masks_of_another_set_are_refused(tmp_path: Path):
    np.savez(tmp_path / "parts.npz", key=np.array(["a"]), path=np.array(["x/y/z/0.jpg"]), mask=np.zeros((1, 8, 8)))

    class Files:
        identity = "files"

        def __init__(self) -> None:
            self.keys = ["a", "b"]

        def load(self, row: int) -> Image.Image:
            return Image.new("RGB", (8, 8))

    with pytest.raises(MaskError, match="no mask of 1 of 2 pictures"):
        PartMasks(Files(), tmp_path / "parts.npz")


@given(
    arrays(np.uint8, (6, 9), elements=st.sampled_from([0, 1, 2, 255])),
    arrays(np.uint8, (6, 9), elements=st.integers(0, 2)),
)
def test_mean_iou_is_scikit_learns(truth: np.ndarray, given: np.ndarray):
    asked = truth != 255
    if asked.any():
        counts = confusion(truth, given, 3)
        there = np.union1d(truth[asked], given[asked])
        expected = jaccard_score(truth[asked], given[asked], labels=there, average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
        assert mean_iou(counts) == pytest.approx(expected)
        best = max(mean_iou(confusion(truth, np.full_like(truth, kind), 3)) for kind in np.unique(truth[asked]))
        assert constant_iou(counts) == pytest.approx(best)


@given(arrays(np.uint8, (12, 10), elements=st.sampled_from([0, 1, 2, 255])))
def test_the_class_under_a_patch(mask: np.ndarray):
    under = under_patches(mask, 3, 5, 3)
    for row in range(3):
        for column in range(5):
            block = mask[4 * row : 4 * row + 4, 2 * column : 2 * column + 2].ravel()
            counts = np.bincount(block[block != 255], minlength=3)
            expected = 255 if (block == 255).sum() >= counts.sum() else counts.argmax()
            assert under[row, column] == expected


def test_colours_segment_colours_and_noise_does_not(voc: Path):
    train, query = open_voc(voc, "train"), open_voc(voc, "val")
    seen = run_segmentation(Colours(), train, query, seed=0, options=QUICK)
    blind = run_segmentation(Noise(), train, query, seed=0, options=QUICK)
    assert seen["segmentation_knn_miou"] > 0.75
    assert seen["segmentation_linear_miou"] > 0.75
    assert seen["segmentation_chance"] == blind["segmentation_chance"] < 0.35
    for name in ("segmentation_knn_miou", "segmentation_linear_miou"):
        assert blind[name] < blind["segmentation_chance"] + 0.05


def test_one_seed_gives_one_table(voc: Path):
    train, query = open_voc(voc, "train"), open_voc(voc, "val", limit=2)
    subject = open_subject("timm:test_vit", size=64)
    options = dataclasses.replace(QUICK, side=64, steps=6, references=40)
    first, again = (run_segmentation(subject, train, query, seed=3, options=options) for _ in range(2))
    other = run_segmentation(subject, train, query, seed=4, options=options)
    assert first == again != other


def test_a_grid_of_rates_trains_each_as_if_alone(voc: Path):
    train = open_voc(voc, "train")
    rate = QUICK.rates[1]
    alone = dataclasses.replace(QUICK, rates=(rate,), steps=12)
    # A rate at which nothing is learned cannot be chosen.
    both = dataclasses.replace(alone, rates=(1e-9, rate))
    maps = []
    for options in (alone, both):
        tokens = Tokens(Colours(), train, options)
        sample, _ = reference_patches(tokens, 0, options)
        fitted, chosen = fit_linear(tokens, sample, 0, options)
        assert chosen == rate
        maps.append(fitted)
    torch.testing.assert_close(maps[0].weights[0], maps[1].weights[0])


def test_the_loss_is_that_of_enlarged_scores():
    draws = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(2, 3, 4, 5, generator=draws), torch.randint(0, 3, (16, 20), generator=draws).byte()
    truth[:5] = 255
    large = torch.stack([enlarged(each, (16, 20)) for each in scores])
    expected = sum(F.cross_entropy(each[None], truth[None].long(), ignore_index=255) for each in large)
    torch.testing.assert_close(pixel_loss(scores, truth, 1000, draws), expected)
    few = torch.stack([pixel_loss(scores, truth, 20, draws) for _ in range(400)])
    assert abs(float(few.mean() - expected)) < 0.1 * float(expected)
    assert len(few.unique()) > 300
    assert float(pixel_loss(scores, torch.full_like(truth, 255), 20, draws)) == 0


def test_memory_is_bounded_and_changes_nothing(voc: Path):
    train = open_voc(voc, "train")
    sample, labels = reference_patches(Tokens(Colours(), train, QUICK), 0, dataclasses.replace(QUICK, references=60))
    assert len(sample) == len(labels) == 60
    small = dataclasses.replace(QUICK, keep=2000, steps=4)
    tight, roomy = Tokens(Colours(), train, small), Tokens(Colours(), train, QUICK)
    fits = [fit_linear(tokens, sample, 0, small)[0] for tokens in (tight, roomy)]
    assert sum(kept.nbytes for kept in (*tight._kept.values(), *tight._masks.values())) <= 2000
    assert torch.equal(fits[0].weights[0], fits[1].weights[0])


def test_what_cannot_be_learned_is_refused(voc: Path, tmp_path: Path):
    train = open_voc(voc, "train")
    with pytest.raises(SegmentationError, match="two pictures"):
        run_segmentation(Colours(), open_voc(voc, "train", limit=1), train, seed=0)
    other = draw_voc(tmp_path / "voc", images=4)
    (other / "classes.txt").write_text("ground\ngreen\nred")
    with pytest.raises(SegmentationError, match="different classes"):
        run_segmentation(Colours(), train, open_voc(other, "val"), seed=0)
    for path in other.glob("SegmentationClass/*.png"):
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    blank = open_voc(other, "train")
    with pytest.raises(SegmentationError, match="ignored"):
        run_segmentation(Colours(), blank, blank, seed=0, options=QUICK)
