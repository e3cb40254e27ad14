"""The report of a real run with every objective, as a browser shows it, and the drawings that it keeps."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.launch import join
from gristmill.ops.recipe import load_recipe
from gristmill.ops.report import write_report
from gristmill.ops.report.attempts import Attempts
from gristmill.ops.report.draw.attention import class_attention, components, look
from gristmill.ops.report.draw.source import Source, open_source
from gristmill.ops.report.draw.tree import drop_probability, embed, nodes
from gristmill.ops.report.drawings import NAMES, drawings_of, path_of, shown_position
from gristmill.ops.train import train
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from torch.nn.functional import cosine_similarity

from .browser import Browser
from .test_report import HOSTILE, Page

BATCH, STEPS = 16, 6
TINY = (
    f"batch={BATCH}", f"images={BATCH * STEPS}", "student.patch_size=8", "student.image_size=32", "student.embed_dim=32",
    "student.depth=2", "student.heads=2", "views.teacher.size=32", "views.global.size=32", "views.local.size=16",
    "views.local.count=2", "objectives.hierarchy.levels=[8,4,2]", "objectives.hierarchy.memory=32", "objectives.hierarchy.queue=64",
    "objectives.hierarchy.warmup=0", "objectives.hierarchy.every=32", "objectives.dense.correspondence=features",
    "objectives.dense.queue=64", "objectives.instance.queue=64", "objectives.local_group.queue=64",
    "objectives.local_group.memory=64", "student.projections.dense.grid=4", "probes.at=[0.0,1.0]", "probes.size=32", "probes.neighbours=5",
    "metrics.port=off", "watchdog=0", "threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run folder, beside its data, with its report."""
    root = tmp_path_factory.mktemp("report")
    make_demo_images(root / "images", images=96, instances=2, size=48)
    ingest_folder(root / "images", root / "data", holdout=0.2)
    data = (f"data={root / 'data' / 'train'}", f"probes.query={root / 'data' / 'probe'}")
    join()
    try:
        train(load_recipe("multigrain-vits16", [*TINY, *data], tiny=True), root / "run", quiet=True)
    finally:
        join()
    write_report(root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return open_source(run, load_recipe(run / "recipe.yaml"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_every_section_is_on_the_page(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    page.assert_inert()
    assert "missing" not in [value for name, value in page.attributes if name == "class"]
    marks = {value for name, value in page.attributes if name == "id"}
    assert marks >= {
        "what-was-learned", "nearest-neighbours", "attention-and-patch-features", "matches-between-two-crops", "local-groups",
        "the-hierarchy", "losses", "what-the-network-saw", "data", "speed",
    }  # fmt: skip
    assert {value[1:] for name, value in page.attributes if name == "href"} == marks
    for words in (
        "instance × 0.1, dense × 0.1, local group × 0.1, hierarchy, group", "finished after 96 images", "Prototypes on 3 levels, 8 under 4 under 2",
        "False negatives that selection removes", "every image took its own slot", "same fine label", "Phases, milliseconds a step",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(text) < 3_000_000


@pytest.mark.program("chromium")
def test_a_browser_shows_it_offline_without_a_complaint(run: Path, browser: Browser) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        browser.open(run / "report.html", scheme=scheme)
        sizes = browser.ask(
            "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.alt.length], () => [0, 0])))"
        )
        assert len(sizes) > 100
        assert all(width > 0 and alt > 0 for width, alt in sizes)
        assert browser.said() == []
        assert browser.requests() == []
        grounds[scheme] = browser.ask(
            "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color"
        )
    assert grounds["light"] != grounds["dark"]


@pytest.mark.program("chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_narrow_screen_does_not_scroll_sideways(run: Path, browser: Browser, width: int) -> None:
    browser.open(run / "report.html", width=width)
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("innerWidth") == width
    shown = browser.ask("document.documentElement.clientWidth")
    assert browser.ask("document.documentElement.scrollWidth") == shown
    # Nor is anything cut off, but for tables and texts that scroll by themselves.
    outside = f"e => !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > {shown} + 1"
    assert (
        browser.ask(f"[...document.querySelectorAll('main *')].filter({outside}).map(e => e.outerHTML.slice(0, 99))")
        == []
    )


@pytest.mark.program("chromium")
def test_hostile_names_do_nothing_in_a_browser(copy: Path, browser: Browser) -> None:
    recipe = (copy / "recipe.yaml").read_text().replace("name: multigrain-vits16", f"name: {json.dumps(HOSTILE)}", 1)
    (copy / "recipe.yaml").write_text(recipe)
    entry = {"shard": HOSTILE, "row": 1, "key": HOSTILE, "reason": HOSTILE}
    (copy / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    with (copy / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "event", "event": HOSTILE, "position": 1, HOSTILE: HOSTILE}) + "\n")
    attempts = Attempts(copy)
    attempts.begin(0)
    attempts.end(96, HOSTILE)
    browser.open(write_report(copy))
    assert browser.ask("document.title").startswith(HOSTILE)
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("[...document.images].filter(i => !i.src.startsWith('data:')).length") == 0
    assert browser.said() == []
    assert browser.requests() == []


def test_the_page_is_made_again_without_checkpoint_and_data(copy: Path) -> None:
    whole = write_report(copy).read_text()
    shutil.rmtree(copy / "checkpoints")
    again = write_report(copy).read_text()
    for mark in ("attention-and-patch-features", "the-hierarchy", "local-groups", "matches-between-two-crops"):
        part = f'<section id="{mark}">'
        assert again.partition(part)[2].partition("</section>")[0].count("<img") == (
            whole.partition(part)[2].partition("</section>")[0].count("<img")
        )
    assert "there is no checkpoint to draw from" in again  # so they may be old
    shutil.rmtree(copy / "report")
    page = Page(write_report(copy).read_text())
    page.assert_inert()
    assert page.text.count("there is no checkpoint to draw from") == len(NAMES)


def test_data_that_is_gone_is_said_and_costs_nothing_else(copy: Path) -> None:
    shutil.rmtree(copy / "report")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(str(Path("data") / "train"), str(Path("data") / "gone")))
    page = Page(write_report(copy).read_text())
    assert sorted(path.stem for path in (copy / "report").iterdir()) == ["attention"]  # which asks the held-out images
    for name in ("No tree with images yet", "No local groups yet", "No drawn matches yet"):
        assert name in page.text
    assert "gone" in page.text


def test_drawings_are_kept_until_there_is_a_newer_checkpoint(run: Path) -> None:
    stamps = {name: path_of(run, name).stat().st_mtime_ns for name in NAMES}
    assert {shown_position(run, name) for name in NAMES} == {BATCH * STEPS}
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    assert {name: path_of(run, name).stat().st_mtime_ns for name in NAMES} == stamps


def test_an_older_drawing_is_made_anew(copy: Path) -> None:
    path = path_of(copy, "attention")
    with np.load(path) as archive:
        held = {name: archive[name] for name in archive.files}
    np.savez(path, **held | {"position": np.array(1), "pca": np.zeros_like(held["pca"])})
    assert CliRunner().invoke(main, ["report", str(copy), "--no-draw"]).exit_code == 0
    assert shown_position(copy, "attention") == 1
    write_report(copy)
    with np.load(path) as archive:
        assert all(np.array_equal(archive[name], held[name]) for name in held)  # the same images, the same pictures


def test_sections_that_do_not_apply_are_not_there() -> None:
    assert drawings_of({}) == []
    assert drawings_of({"student": {}, "objectives": {"group": {}, "hierarchy": None}}) == ["attention"]
    assert drawings_of({"student": {}, "objectives": {"dense": {}, "local_group": {}}}) == [
        "attention",
        "groups",
        "matches",
    ]
    assert drawings_of({"student": 3, "objectives": {"dense": {}}}) == []


def test_attention_is_what_the_block_pays(source: Source) -> None:
    """The block's own output comes out of these shares and its values."""
    backbone = source.teacher.backbone
    block: Any = backbone.blocks[-1]
    tokens = torch.randn(2, 17, backbone.embed_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares = class_attention(block, tokens)
        value = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, shares.shape[1], -1))[:, :, 2]
        own = block.attn.proj(torch.einsum("nht,nthd->nhd", shares, value).flatten(1))
        torch.testing.assert_close(own, block.attn(block.norm1(tokens))[:, 0], rtol=1e-4, atol=1e-5)
    maps, places = look(backbone, torch.zeros(1, 3, 64, 64))
    assert maps is not None
    assert maps.shape == (1, 2, 8, 8)
    assert places.shape == (1, 8, 8, 32)
    assert maps.sum() < 2


def test_components_are_those_of_numpy(source: Source) -> None:
    places = torch.randn(3, 4, 4, 7, generator=torch.Generator().manual_seed(1)) * torch.tensor([9, 5, 3, 1, 1, 1, 1.0])
    rows = places.reshape(-1, 7).double().numpy()
    found = (rows - rows.mean(0)) @ np.linalg.svd(rows - rows.mean(0))[2][:3].T
    drawn = components(places).reshape(-1, 3).astype(float)
    for channel in range(3):
        inside = (drawn[:, channel] > 0) & (drawn[:, channel] < 255)
        assert abs(np.corrcoef(found[inside, channel], drawn[inside, channel])[0, 1]) > 0.9999
    assert (components(torch.ones(1, 2, 2, 2)) == 128).all()


def test_the_tree_is_walked_as_training_walks_it(source: Source) -> None:
    objective = source.objectives.objectives["hierarchy"]
    keys = embed(source)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)))
    lineage = objective.tree.lineage(objective.tree.assign(keys))
    dropped = drop_probability(objective.levels, keys, lineage)
    low, high = objective.config.instance_keep
    plain = torch.zeros_like(dropped)
    for level, prototypes in enumerate(objective.tree.prototypes):
        temperature = objective.tree.phi[level].clamp(min=1e-3)
        member = (keys @ (prototypes / temperature[:, None]).T).softmax(1)  # [image, prototype]
        plain += 1 - (1 - member[:, lineage[level]].T).clamp(low, high)
    torch.testing.assert_close(dropped, plain / len(lineage), rtol=1e-4, atol=1e-5)


def test_nodes_are_counted_and_nested() -> None:
    lineage = np.array([[0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]])
    cosine = np.zeros((6, 3))
    cosine[:, 2] = np.arange(6)
    found = nodes(lineage, cosine, np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8))
    assert found["depth"].tolist() == [0, 1, 1, 0, 1]
    assert found["number"].tolist() == [0, 0, 1, 1, 2]
    assert found["images"].tolist() == [3, 2, 1, 3, 3]
    assert found["picture"][3, :3, 0, 0, 0].tolist() == [5, 4, 3]  # the surest first
    assert found["used"].tolist() == [3, 2]


def test_local_groups_leave_the_image_itself_out(run: Path) -> None:
    with np.load(path_of(run, "groups")) as archive:
        assert sorted(set(archive["who"].tolist())) == ["memory", "mixed"]
        for query, found, cosine in zip(archive["query"], archive["neighbour"], archive["similarity"], strict=True):
            assert not (found == query).all((1, 2, 3)).any()
            assert (np.diff(cosine) <= 1e-6).all()


def test_matches_are_counted_for_both(run: Path) -> None:
    with np.load(path_of(run, "matches")) as archive:
        scores = json.loads(str(archive["scores"]))
    for row in scores.values():
        assert all(0 <= value <= 1 for value in row.values())
    assert scores["trained"]["features_chance"] == scores["random"]["features_chance"]


def test_mixed_features_are_the_networks_own(source: Source) -> None:
    """The same as the teacher's forward gives out for the same images."""
    from gristmill.ops.report.draw.groups import mixed
    from gristmill.ops.report.draw.source import SEEN, _images

    images = _images(source.reference, SEEN, source.size)
    with torch.no_grad():
        out = source.teacher([images.pixels[:8]], source.objectives.teacher_context())
    assert images.keys == source.glance.keys
    assert (cosine_similarity(mixed(source)[:8], out["local_group"]) > 1 - 1e-5).all()
    torch.testing.assert_close(source.glance.row[:8], out["memory_row"], rtol=1e-4, atol=1e-5)
