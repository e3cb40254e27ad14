"""The contact sheet of views: real crops of real images by both executors, numbers that are right, and errors that help."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gristmill.ops import contact
from gristmill.ops.cli import main
from gristmill.ops.contact import Sheet, found_views, in_words, make_sheet
from gristmill.ops.contact_page import AMPLIFIED, amplified, as_page, spread
from gristmill.ops.contact_picture import as_picture
from gristmill.pipeline.augment.colour import MEAN, STD
from gristmill.pipeline.draws import COLUMNS, NEVER
from gristmill.pipeline.standalone import images
from gristmill.pipeline.strong import NUMBER
from gristmill.pipeline.views import StreamConfig
from gristmill.shards.ingest import ingest_folder
from gristmill.shards.manifest import Manifest
from PIL import Image

from ..pipeline.textures import jpegs
from .test_report import HOSTILE, Page

RECIPE = """
name: mine
batch: 2
images: 4
stream: {lanes: 1, window: 4, seed: 1}
views:
  - {name: large, count: 2, size: 32, strong: mugs, weak_p: 0.4, coin: image}
  - {name: small <i>, count: 3, size: 16, scale: [0.05, 0.25], role: student, augment: {jitter_p: 0, grey: 0}}
objectives: {instance: {}}
student: {patch_size: 16, image_size: 32, embed_dim: 64, depth: 1, heads: 4}
probes: {size: 32}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs as a data set, and a recipe."""
    root = tmp_path_factory.mktemp("contact")
    (root / "images").mkdir()
    for number, jpeg in enumerate(jpegs()):
        (root / "images" / f"{number}.jpg").write_bytes(jpeg)
    ingest_folder(root / "images", root / "data", shard_samples=2)
    (root / "my.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def sheet(root: Path) -> Sheet:
    return make_sheet(str(root / "my.yaml"), str(root / "data" / "train"), images=4)


def run(*arguments: object):
    return CliRunner().invoke(main, ["look", "views", *map(str, arguments)])


def test_it_shows_what_training_is_fed(root: Path, sheet: Sheet) -> None:
    assert not sheet.refused
    assert sheet.seed == 1
    views, config = found_views(str(root / "my.yaml"))
    assert isinstance(config, StreamConfig)
    with images(root / "data" / "train", 4, views=views, config=config) as stream:
        batch = next(stream)
    assert [shot.key for shot in sheet.shots] == batch.keys
    for slot, shot in enumerate(sheet.shots):
        fed = [view[slot, n].movedim(0, -1).numpy() for view in batch.views.values() for n in range(view.shape[1])]
        for crop, pixels in zip(shot.crops, fed, strict=True):
            levels = (pixels * np.array(STD) + np.array(MEAN)) * 255
            assert np.abs(crop.cpu - levels.clip(0, 255)).max() <= 0.5001


def test_outlines_are_the_crops_of_the_image(sheet: Sheet) -> None:
    """A crop that is only cut shows the mean colour of what its outline encloses."""
    checked = 0
    for shot in sheet.shots:
        height, width = shot.image.shape[:2]
        for crop in shot.crops:
            assert crop.outline.shape == (4, 2)
            if crop.form != "strong":
                assert crop.outline.min() >= -1e-3
                assert (crop.outline.max(0) <= np.array([width, height]) + 1e-3).all()
            if set(crop.words) <= {"flipped"}:
                (x0, y0), (x1, y1) = np.rint(crop.outline.min(0)).astype(int), np.rint(crop.outline.max(0)).astype(int)
                inside = shot.image[y0:y1, x0:x1].mean((0, 1))
                assert np.abs(inside - crop.cpu.mean((0, 1))).max() < 5
                checked += 1
    assert checked >= 12


def test_weak_strong_and_distances(sheet: Sheet) -> None:
    assert {crop.form for crop in sheet.crops("large")} == {"weak", "strong"}
    assert {crop.form for crop in sheet.crops("small <i>")} == {""}
    for crop in sheet.crops("small <i>"):  # both executors say the same of what is weak
        assert crop.apart is not None
        assert crop.mean < 0.1
        assert np.array_equal(amplified(crop) > 0, np.rint(crop.apart * AMPLIFIED) > 0)
    crops = sheet.crops("large")
    mean, largest = spread(crops)
    assert largest == max(crop.largest for crop in crops)
    assert mean == pytest.approx(np.mean([crop.mean for crop in crops]))
    strong = [crop for crop in crops if crop.form == "strong"]
    assert len({crop.words for crop in strong}) > 1


def test_the_page_is_inert_and_its_numbers_are_right(sheet: Sheet) -> None:
    text = as_page(sheet)
    page = Page(text)
    page.assert_inert()
    assert "://" not in re.sub(r"data:image/[^\"]*", "", text)
    for shot in sheet.shots:
        assert shot.key in page.text
        for crop in shot.crops:
            assert f"apart: mean {crop.mean:.3f}, largest {crop.largest:.1f}" in page.text
            assert ", ".join(crop.words) in page.text
    assert "prefers-color-scheme:dark" in text
    assert page.tags.count("polygon") == 4 * 5
    uris = re.findall(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]
    assert len(pictures) == 4 * (1 + 3 * 5)
    assert np.array_equal(np.asarray(pictures[3]), amplified(sheet.shots[0].crops[0]))  # image, CPU, DALI, this


def test_names_from_outside_stay_text(sheet: Sheet) -> None:
    shot = sheet.shots[0]
    hostile = Sheet(HOSTILE, HOSTILE, 0, sheet.views, [contact.Shot(0, HOSTILE, True, shot.image, shot.crops)], HOSTILE)
    page = Page(as_page(hostile))
    page.assert_inert()
    assert page.text.count("</script>") >= 3
    assert "in place of one that is damaged" in page.text


def test_the_picture_holds_every_crop(sheet: Sheet) -> None:
    picture = np.asarray(as_picture(sheet))
    assert picture.shape[1] > 1000
    crop = np.asarray(Image.fromarray(sheet.shots[0].crops[0].cpu).resize((128, 128)))
    windows = np.lib.stride_tricks.sliding_window_view(picture[60:260, 400:640], crop.shape)[:, :, 0]
    assert (windows == crop).all((-1, -2, -3)).any()


def test_seed_and_position_choose(root: Path) -> None:
    first, second = (
        make_sheet("moco-v2", str(root / "data" / "train"), images=1, seed=s, position=p) for s, p in ((0, 1), (1, 1))
    )
    assert first.shots[0].position == 1
    assert not np.array_equal(first.shots[0].crops[0].outline, second.shots[0].crops[0].outline)
    again = make_sheet("moco-v2", str(root / "data" / "train"), images=2)
    assert again.seed == 0
    assert np.array_equal(again.shots[1].crops[0].cpu, first.shots[0].crops[0].cpu)


def test_the_command(root: Path, tmp_path: Path) -> None:
    data = root / "data" / "train"
    answer = run(root / "my.yaml", "--data", data, "--images", 2, "--out", tmp_path / "a.html", "--json")
    assert answer.exit_code == 0, answer.output
    about = json.loads(answer.output)
    assert (about["images"], about["crops"], about["refused"]) == (2, 5, "")
    made = make_sheet(str(root / "my.yaml"), str(data), images=2)
    assert (about["mean"], about["largest"]) == spread([crop for shot in made.shots for crop in shot.crops])
    assert (tmp_path / "a.html").read_text() == as_page(made)
    answer = run("hcsc-multicrop", "--data", data, "--images", 1, "--out", tmp_path / "b.png")
    assert answer.exit_code == 0
    assert "1 images with 6 crops each" in answer.output
    assert "grey levels of 255 apart on average" in answer.output
    Image.open(tmp_path / "b.png").load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.png"]


def test_where_dali_is_missing_its_column_says_why(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gristmill.pipeline.augment.dali", None)  # as if it did not import
    answer = run(root / "my.yaml", "--data", root / "data" / "train", "--images", 1, "--out", tmp_path / "a.html")
    assert answer.exit_code == 0
    assert "DALI does not carry these views out: import of" in answer.output
    page = Page((tmp_path / "a.html").read_text())
    assert page.text.count("no DALI: import of") == 5
    assert "apart:" not in page.text
    lone = make_sheet(str(root / "my.yaml"), str(root / "data" / "train"), images=1)
    assert as_picture(lone).width > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mug",), "did you mean 'mugs'?"),
        (("mocov2",), "did you mean 'moco-v2'?"),
        (("dmo",), "did you mean 'demo'?"),
        (("nothing/here.yaml",), "there is no such file"),
        (("mugs", "--out", "sheet.pdf"), ".html or .png"),
        (("mugs", "--out", "no/such/folder/a.html"), "make it first"),
        (("mugs", "--images", "0"), "0 is not in the range"),
    ],
)
def test_errors_as_a_user_makes_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run(*arguments, "--data", root / "data" / "train")
    assert answer.exit_code == 2
    assert words in answer.output
    assert not list(tmp_path.iterdir())


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    answer = run("mugs", "--data", tmp_path / "nowhere", "--out", tmp_path / "a.html")
    assert answer.exit_code == 2
    assert str(tmp_path / "nowhere") in answer.output
    assert not list(tmp_path.iterdir())


def test_words() -> None:
    params = np.zeros(len(COLUMNS), np.float32)

    def put(**values: float) -> None:
        for name, value in values.items():
            params[COLUMNS.index(name)] = value

    put(brightness=1, contrast=1, saturation=1, solarize=NEVER)
    assert in_words(params) == ()
    put(op1=NUMBER["Rotate"], arg1=-12.5, op2=NUMBER["Posterize"], arg2=2, flip=1, sigma=1.25)
    put(brightness=0.8, hue=0.1, grey=1, solarize=128, erase_x0=3, erase_x1=13, erase_y0=5, erase_y1=12)
    assert in_words(params) == (
        *("Rotate -12.5°", "Posterize to 2 bits", "flipped", "brightness x0.80", "hue +36°", "grey"),
        *("blur, sigma 1.25", "solarised from 128", "erased 10 x 7"),
    )
    for name in NUMBER:  # all have words
        put(op1=NUMBER[name], arg1=0.3)
        assert in_words(params)[0].startswith(name)


def test_a_damaged_image_is_replaced_and_said_to_be(root: Path, tmp_path: Path) -> None:
    data = shutil.copytree(root / "data" / "train", tmp_path / "train")
    manifest = Manifest.open(data)
    rows = manifest.rows(0)
    with manifest.path(0).open("r+b") as file:
        file.seek(int(rows.offset[0]) + 2)
        file.write(b"\0" * (int(rows.length[0]) - 2))
    sheet = make_sheet("moco-v2", str(data), images=4)
    assert [shot.substituted for shot in sheet.shots].count(True) == 1
    assert rows.keys[0] not in [shot.key for shot in sheet.shots]
    assert Page(as_page(sheet)).text.count("(in place of one that is damaged or removed)") == 1
