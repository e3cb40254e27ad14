"""Labels carried through clips, and the measures J and F."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.ops.evaluate.davis import DavisError, border, border_agreement, clip_scores, open_davis, region_overlap
from gristmill.ops.evaluate.subject import open_subject
from gristmill.ops.evaluate.video import DINO, MUGS, VideoOptions, carry, frame_size, run_video
from gristmill.shards.demo import make_demo_images
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import jaccard_score

SMALL = VideoOptions(side=64, multiple=4, frames=3, radius=6)


class Colours:
    """A network that knows a patch's mean colour and nothing else."""

    size, stride, mean, std = 64, 2, (0.47, 0.47, 0.47), (0.25, 0.25, 0.25)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, self.stride).permute(0, 2, 3, 1)


class Noise(Colours):
    """Features of a place that are drawn anew for every frame."""

    def __init__(self) -> None:
        self.draws = torch.Generator().manual_seed(0)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(images), images.shape[2] // 2, images.shape[3] // 2, 32, generator=self.draws)


def draw_davis(root: Path, textures: Path, frames: int = 7) -> Path:
    """Two clips: pieces of drawn cloth that move over a plain ground by a known path, one of them two pieces."""
    tiles = [np.asarray(Image.open(path).convert("RGB").resize((48, 48))) for path in sorted(textures.rglob("*.jpg"))]
    tints = np.array([[235, 40, 40], [40, 60, 235]])
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("one\ntwo\n")
    for clip, pieces in (("one", 1), ("two", 2)):
        for part in ("JPEGImages", "Annotations"):
            (root / part / "480p" / clip).mkdir(parents=True)
        for frame in range(frames):
            pixels = np.full((64, 80, 3), 120, np.float64) + np.arange(80)[None, :, None] * 0.2
            mask = np.zeros((64, 80), np.uint8)
            for piece in range(pieces):
                top, left = 6 + 32 * piece + frame % 3, 6 + 4 * frame if piece == 0 else 50 - 4 * frame
                area = np.s_[top : top + 22, left : left + 22]
                pixels[area] = 0.8 * tints[piece] + 0.2 * tiles[piece * 5][:22, :22]
                mask[area] = 1 + piece
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"JPEGImages/480p/{clip}/{frame:05}.jpg", quality=95)
            Image.fromarray(mask, mode="P").save(root / f"Annotations/480p/{clip}/{frame:05}.png")
    return root


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("davis")
    make_demo_images(folder / "cloth", images=32, instances=1, size=48)
    return draw_davis(folder / "DAVIS", folder / "cloth")


def test_colours_follow_their_objects_and_noise_does_not(davis: Path):
    seen = run_video(Colours(), davis, options=SMALL)
    blind = run_video(Noise(), davis, options=SMALL)
    assert seen["video_j"] > 0.9
    assert seen["video_f"] > 0.9
    assert seen["video_j_f"] == pytest.approx((seen["video_j"] + seen["video_f"]) / 2)
    assert seen["video_chance"] == blind["video_chance"] < 0.6
    assert blind["video_j_f"] < blind["video_chance"] + 0.1


def test_a_network_gives_one_table_twice(davis: Path):
    subject = open_subject("timm:test_vit", size=64)
    first, again = (
        run_video(subject, davis, options=dataclasses.replace(SMALL, side=64, multiple=16)) for _ in range(2)
    )
    assert first == again
    assert all(0 <= value <= 1 for value in first.values())


def plain_carry(tokens: torch.Tensor, context: list, labels: list, options: VideoOptions) -> torch.Tensor:
    """As DINO's script does it: all similarities, those too far away multiplied by nothing, all but the top ones removed."""
    d, high, wide = tokens.shape
    y, x = (each.flatten() for each in torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"))
    near = ((y[:, None] - y).abs() <= options.radius) & ((x[:, None] - x).abs() <= options.radius)
    keys = torch.stack([each.reshape(d, -1) for each in context])  # [n, d, hw]
    affinity = (torch.einsum("dq,ndk->nkq", tokens.reshape(d, -1), keys) / options.temperature).exp() * near.T
    affinity = affinity.flatten(0, 1)  # [n hw, hw]
    least = affinity.topk(min(options.top, len(affinity)), dim=0).values[-1]
    affinity = torch.where(affinity < least, 0, affinity)
    affinity = affinity / affinity.sum(0, keepdim=True)
    said = torch.stack(labels).permute(1, 0, 2, 3).flatten(1)  # [C, n hw]
    return (said @ affinity).reshape(-1, high, wide)


@pytest.mark.parametrize(("radius", "top", "frames"), [(2, 5, 3), (12, 5, 2), (0, 5, 2), (1, 50, 1)])
def test_carrying_is_the_plain_form(radius: int, top: int, frames: int):
    draws = torch.Generator().manual_seed(radius)
    tokens = F.normalize(torch.randn(frames + 1, 8, 5, 7, generator=draws, dtype=torch.float64), dim=1)
    labels = torch.rand(frames, 3, 5, 7, generator=draws, dtype=torch.float64).softmax(1)
    options = VideoOptions(radius=radius, top=top)
    arguments = (tokens[0], list(tokens[1:]), list(labels), options)
    torch.testing.assert_close(carry(*arguments), plain_carry(*arguments))


def test_the_papers_settings_and_sizes():
    assert (DINO.frames, MUGS.frames) == (7, 20)
    assert (DINO.temperature, DINO.top, DINO.radius) == (0.1, 5, 12)
    assert frame_size(854, 480, 16, DINO) == (832, 480)
    assert frame_size(480, 854, 8, DINO) == (480, 832)
    assert frame_size(854, 480, 14, DINO) == (826, 476)


masks = arrays(np.bool_, (11, 14))


@given(masks, masks, arrays(np.bool_, (11, 14), elements=st.sampled_from([False, False, True])))
def test_region_overlap_is_scikit_learns(truth: np.ndarray, given: np.ndarray, void: np.ndarray):
    if ((truth | given) & ~void).any():
        expected = jaccard_score(truth[~void], given[~void])
        assert region_overlap(truth, given, void) == pytest.approx(expected)
    else:
        assert region_overlap(truth, given, void) == 1


def plain_border(mask: np.ndarray) -> np.ndarray:
    """Pixel by pixel, as davis2017-evaluation's seg2bmap states it."""
    high, wide = mask.shape
    out = np.zeros_like(mask)
    for y in range(high):
        for x in range(wide):
            right, below = min(x + 1, wide - 1), min(y + 1, high - 1)
            out[y, x] = any(mask[y, x] != mask[v, u] for v, u in ((y, right), (below, x), (below, right)))
    return out


def plain_agreement(truth: np.ndarray, given: np.ndarray, reach: float) -> float:
    """By the distance of each border's pixel to the other border."""
    true, made = plain_border(truth), plain_border(given)
    if not true.any() or not made.any():
        return float(true.any() == made.any())
    to_made, to_true = (np.asarray(distance_transform_edt(~each)) for each in (made, true))
    recall, precision = (to_made[true] <= reach).mean(), (to_true[made] <= reach).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@given(masks, masks, st.sampled_from([1, 2, 3]))
def test_border_agreement_is_the_plain_form(truth: np.ndarray, given: np.ndarray, reach: int):
    assert (border(truth) == plain_border(truth)).all()
    assert border_agreement(truth, given, tolerance=reach) == pytest.approx(plain_agreement(truth, given, reach))


def test_the_tolerance_is_of_the_diagonal():
    square = np.zeros((480, 854), np.bool_)
    square[100:300, 200:500] = True
    for shift, expected in ((8, True), (9, False)):  # ceil(.008 * 979.6) = 8
        moved = np.roll(square, shift, axis=1)
        upright = border_agreement(square, moved)
        assert (upright > 0.999) == expected
    void = np.zeros_like(square)
    void[:, 480:] = True
    assert border_agreement(square, square & ~void, void) == 1


def test_first_and_last_frames_do_not_count():
    truth = [np.full((6, 6), number, np.uint8) for number in (1, 1, 1, 1)]
    truth[1] = truth[1] * np.tri(6, dtype=np.uint8)
    empty = [np.zeros_like(truth[0])] * 4
    right_inside = [empty[0], truth[1], truth[2], empty[0]]
    assert clip_scores(truth, right_inside) == [(1.0, 1.0)]
    assert clip_scores(truth, [truth[0], empty[0], empty[0], truth[3]]) == [(0.0, 0.5)]  # a full frame has no border


def test_broken_clips_are_refused(davis: Path, tmp_path: Path):
    with pytest.raises(DavisError, match="has no split 'test'"):
        open_davis(davis, "test")
    make_demo_images(tmp_path / "cloth", images=32, instances=1, size=48)
    root = draw_davis(tmp_path / "DAVIS", tmp_path / "cloth", frames=3)
    last = root / "Annotations/480p/two/00002.png"
    kept = last.read_bytes()
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(last)
    with pytest.raises(DavisError, match="different sizes"):
        run_video(Colours(), root, options=SMALL)
    last.write_bytes(kept[:60])
    with pytest.raises(DavisError, match="cannot be read as a mask"):
        run_video(Colours(), root, options=SMALL)
    last.unlink()
    with pytest.raises(DavisError, match=r"00002\.png is not there"):
        open_davis(root)
    for path in (root / "JPEGImages/480p/one").glob("*0.jpg"):
        path.unlink()
    with pytest.raises(DavisError, match="'one' has 2 frames"):
        open_davis(root)
