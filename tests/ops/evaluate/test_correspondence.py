"""Dense correspondence: the maps are true, perfect features find the place, ignorant ones guess."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.ops.evaluate.correspondence import (
    CorrespondenceError,
    CorrespondenceOptions,
    crop_pair,
    located,
    run_correspondence,
)
from gristmill.ops.evaluate.subject import open_subject
from PIL import Image


class Plain:
    """No network: a patch's mean colour, of which `run_correspondence` makes unit rows."""

    size, stride, mean, std = 64, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, self.stride).permute(0, 2, 3, 1)


class Noise(Plain):
    """Features that are the patch's own and know nothing."""

    def __init__(self) -> None:
        self.draws = torch.Generator().manual_seed(0)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(images), 8, 8, 24, generator=self.draws)


class Places:
    """Pictures whose colour tells the place: red grows with x, green with y, both on one sphere, so that angles tell them apart."""

    def __init__(self, pictures: int, width: int = 160, height: int = 120) -> None:
        self.keys = [str(number) for number in range(pictures)]
        x, y = np.meshgrid((np.arange(width) + 0.5) / width - 0.5, (np.arange(height) + 0.5) / height - 0.5)
        point = np.stack([0.5 + x, 0.5 + y, np.full_like(x, 0.6)], -1)
        self.pixels = (255 * point / np.linalg.norm(point, axis=-1, keepdims=True)).round().astype(np.uint8)

    def load(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels)


def test_crops_show_what_their_maps_say():
    pictures = Places(1, 200, 150)
    picture = pictures.load(0)
    for row in range(6):
        crops, maps = crop_pair(picture, row, Plain(), 5, CorrespondenceOptions())
        assert crops.shape == (2, 3, 64, 64)
        for crop, to_source in zip(crops, maps, strict=True):
            for x, y in ((5, 9), (31, 40), (60, 20)):
                at = to_source @ torch.tensor([x, y, 1.0], dtype=torch.float64)
                column, row_ = (int(v) for v in at.round())
                expected = pictures.pixels[row_, column] / 255
                assert np.allclose(crop[:, y, x].numpy(), expected, atol=0.02)


def test_places_that_tell_themselves_are_found_and_ignorance_guesses():
    pictures = Places(40)
    seen = run_correspondence(Plain(), pictures, seed=0, images=24)
    assert seen["correspondence_ceiling"] == 1.0
    assert seen["correspondence_cell"] > 0.95
    assert seen["correspondence_pck"] > 0.6  # a tenth of 8 cells is less than one
    blind = run_correspondence(Noise(), pictures, seed=0, images=40)
    for name in ("cell", "pck"):
        assert blind[f"correspondence_{name}"] == pytest.approx(blind[f"correspondence_{name}_chance"], abs=0.03)
    assert 0 < blind["correspondence_pck_chance"] < blind["correspondence_cell_chance"] < 0.15


def test_the_crops_share_enough_and_differ():
    options = CorrespondenceOptions(area=(0.1, 0.3), common=0.3)
    maps = torch.stack([crop_pair(Places(1).load(0), row, Plain(), 1, options)[1] for row in range(50)])
    inside = located(maps, 64, 64).inside.float().mean(1)
    assert float(inside.min()) > 0.15
    assert float(inside.mean()) < 0.9
    mirrored = maps[:, :, 0, 0] < 0
    assert 0.3 < float(mirrored.float().mean()) < 0.7


def test_one_seed_gives_one_table():
    subject = open_subject("timm:test_vit", size=64)
    first, again, other = (run_correspondence(subject, Places(5), seed=seed, images=3) for seed in (1, 1, 2))
    assert first == again != other
    assert 0 <= first["correspondence_pck"] <= 1


def test_nothing_to_ask_is_refused():
    with pytest.raises(CorrespondenceError, match="a picture at least"):
        run_correspondence(Plain(), Places(0), seed=0)
    with pytest.raises(CorrespondenceError, match="two a side are needed"):
        run_correspondence(open_subject("timm:test_vit", size=16), Places(1), seed=0)
