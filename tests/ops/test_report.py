"""The page comes from the run folder alone, whatever is there; nothing on it runs, loads or breaks out of its text."""

import base64
import io
import json
import re
import stat
from html.parser import HTMLParser

import numpy as np
import pytest
from gristmill.ops.report import write_report
from gristmill.ops.report.charts import buckets, line_chart, short, ticks
from gristmill.ops.report.crops import load_crops, save_crops, sheet
from gristmill.ops.report.folder import Curve, ReportError, read_run
from gristmill.ops.report.neighbours import load_neighbours, save_neighbours
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

VOID = {"meta", "img"}
HOSTILE = "</script><script>alert('x')</script><img src=http://a/b onerror=\"x\">&'"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def assert_inert(self):
        assert "script" not in self.tags
        assert not {"link", "iframe", "object", "form"} & set(self.tags)
        for name, value in self.attributes:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("#" if name == "href" else "data:image/")


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_log(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_run(folder, word="global"):
    reached = {"chance": 0.125, "pixels": 0.25, "random": 0.2}
    lines = [
        {"kind": "probe", "who": who, "position": 0, "coarse_knn": score, "instance_retrieval": score / 8}
        for who, score in reached.items()
    ]
    for step in range(50):
        if step % 10 == 0:
            lines.append({"kind": "probe", "who": "teacher", "position": 64 * step, "coarse_knn": 0.3 + step / 100})
        lines.append({
            "kind": "step", "position": 64 * step, "loss": 7 - step / 20, "loss/instance": 6.0, f"loss/{word}": step / 3,
            "lr": 0.001, "grad_norm": float("nan") if step == 7 else 3.0, "bad": False,
            "seconds": {"data_wait": 0.01, "student": 0.09},
        })  # fmt: skip
    lines.append({"kind": "event", "event": "skipped", "position": 448, "keys": [word]})
    write_log(folder, lines)
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(word)}\nimages: 3200\nbatch: 64\n")
    save_crops(folder / "crops.npz", {word.replace("/", "|"): np.zeros((4, 2, 3, 16, 16))}, [word] * 4)
    found = {who: (np.full((2, 3), 0.5), np.array([[0, 1, 2], [3, 4, 5]])) for who in ("teacher", "pixels", word)}
    save_neighbours(
        folder / "neighbours.npz", pictures(2, 8, 8, 3), found, pictures(6, 8, 8, 3), [0, -1], [0, 1, 0, 1, 0, 1]
    )


def test_everything_that_a_run_left_is_on_the_page(tmp_path):
    full_run(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    page.assert_inert()
    assert "3,200 images seen in 50 steps – the whole run; 5 s of stepping, 10.0 % of it waiting for data." in page.text
    for row in ("chance", "raw pixels", "random initialisation", "teacher at the start", "teacher after 2,560 images"):
        assert row in page.text
    assert "70.0 %" in page.text
    assert "45.0 points above raw pixels, chance 12.5 %" in page.text
    assert "1 value is not finite" in page.text
    assert page.text.count("✓") == 1 + 2 * 3  # the legend, and two of three matches for each of the three pairs of eyes
    assert "missing" not in [value for name, value in page.attributes if name == "class"]
    assert not list(tmp_path.glob(".report*"))


def test_hostile_names_stay_text(tmp_path):
    full_run(tmp_path, HOSTILE)
    text = write_report(tmp_path).read_text()
    Page(text).assert_inert()
    assert "<script" not in text.lower()
    assert "alert" in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "left", [("recipe.yaml",), ("metrics.jsonl",), ("crops.npz",), ("neighbours.npz",), ("crops.npz", "neighbours.npz")]
)
def test_half_a_run_reads_well(tmp_path, left):
    full_run(tmp_path)
    for name in ("recipe.yaml", "metrics.jsonl", "crops.npz", "neighbours.npz"):
        if name not in left:
            (tmp_path / name).unlink()
    page = Page(write_report(tmp_path).read_text())
    page.assert_inert()
    assert ("No crops yet" in page.text) == ("crops.npz" not in left)
    assert ("No training step is recorded yet" in page.text) == ("metrics.jsonl" not in left)
    assert "nan" not in page.text.lower().split()


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_torn_and_foreign_files_never_break_the_page(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    full_run(folder)
    name = data.draw(st.sampled_from(["recipe.yaml", "metrics.jsonl", "crops.npz", "neighbours.npz"]))
    whole = (folder / name).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=40))
    keep_tail = data.draw(st.booleans())
    (folder / name).write_bytes(whole[:cut] + junk + (whole[cut + len(junk) :] if keep_tail else b""))
    Page(write_report(folder).read_text()).assert_inert()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["step", "probe", "event", "other"])},
            optional=dict.fromkeys(("position", "loss", "who", "coarse_knn", "seconds", "event", "lr"), json_values),
        )
        | json_values,
        max_size=6,
    )
)
def test_any_json_lines_make_a_page(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("run")
    write_log(folder, lines)
    Page(write_report(folder).read_text()).assert_inert()


def test_steps_taken_again_replace_the_earlier_ones(tmp_path):
    write_log(
        tmp_path, [{"kind": "step", "position": p, "loss": loss} for p, loss in ((0, 5), (64, 4), (64, 3), (0, 6))]
    )
    curve = read_run(tmp_path).curves["loss"]
    assert curve.x.tolist() == [0, 64]
    assert curve.y.tolist() == [6, 3]


def test_the_untrained_network_is_the_start_of_the_teachers_curve(tmp_path):
    write_log(
        tmp_path,
        [{"kind": "probe", "who": w, "position": p, "coarse_knn": 0.5} for w, p in (("random", 0), ("teacher", 64))],
    )
    page = Page(write_report(tmp_path).read_text())
    assert "On the way" in page.text
    assert page.tags.count("circle") == 2


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ReportError, match="is no folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "report.html").write_text("of another tool")
    with pytest.raises(
        ReportError, match=r"holds no run \(no recipe\.yaml, no metrics\.jsonl\); name the folder of a run"
    ):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "of another tool"


def test_an_old_report_is_replaced_whole(tmp_path):
    write_log(tmp_path, [])
    (tmp_path / "report.html").write_text("old")
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert stat.S_ISREG((tmp_path / "report.html").stat().st_mode)


def test_crops_survive_the_way_to_the_sheet(tmp_path):
    fed = (pictures(3, 2, 8, 8, 3).astype(np.float32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    save_crops(tmp_path / "crops.npz", {"keys": np.moveaxis(fed, -1, -3)}, ["a", "b", "c"])
    views = load_crops(tmp_path / "crops.npz")
    assert np.array_equal(views["keys"], pictures(3, 2, 8, 8, 3))
    image = sheet(views["keys"])
    assert image.size == (3 * 17 + 2 * 5, 8)
    assert np.array_equal(np.asarray(image)[:, 22:30, :3], views["keys"][1, 0])
    assert sheet(pictures(8, 12, 224, 224, 3)).width == 1400


def test_plain_arrays_are_crops_too(tmp_path):
    np.savez(tmp_path / "crops.npz", local=pictures(2, 3, 4, 4, 3), keys=np.array(["a", "b"]))
    assert list(load_crops(tmp_path / "crops.npz")) == ["local"]


def test_neighbours_keep_who_and_match(tmp_path):
    query, reference = pictures(2, 4, 4, 3), pictures(5, 4, 4, 3)
    found = {
        "teacher": (np.array([[0.9], [0.8]]), np.array([[4], [1]])),
        "pixels": (np.ones((2, 1)), np.zeros((2, 1), int)),
    }
    save_neighbours(tmp_path / "n.npz", query, found, reference, [7, 8], [7, 9, 0, 0, 7])
    near = load_neighbours(tmp_path / "n.npz")
    assert near.who.tolist() == ["teacher", "teacher", "pixels", "pixels"]
    assert near.match.tolist() == [[1], [0], [1], [0]]
    assert np.array_equal(near.neighbour[0, 0], reference[4])
    assert near.by_query() == [[0, 2], [1, 3]]
    save_neighbours(tmp_path / "n.npz", query, found, reference)
    assert (load_neighbours(tmp_path / "n.npz").match == -1).all()


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 8), st.booleans())
def test_ticks_are_inside_and_told_apart(low, width, count, share):
    if width < 1e-7 * abs(low):
        return
    found = ticks(low, low + width, count, share=share)
    values, texts = [value for value, _ in found], [text for _, text in found]
    assert len(found) <= count + 1
    assert values == sorted(set(values))
    assert all(low - 1e-6 * width <= value <= low + width + 1e-6 * width for value in values)
    if abs(low) < 1e4 and 1e-2 < width < 1e4:
        assert len(set(texts)) == len(texts)


def test_buckets_keep_mean_and_range():
    y = np.arange(1000.0)
    y[3] = np.inf
    rows = buckets(Curve(np.arange(1000.0), y), 10)
    assert rows.shape == (10, 4)
    assert rows[1].tolist() == [149.5, 149.5, 100, 199]
    assert rows[0, 3] == 99


def test_a_chart_says_its_values_without_a_script():
    curve = Curve(np.array([0.0, 100.0, 200.0]), np.array([1.0, np.nan, 3.0]))
    chart = line_chart("Loss <b>", {"a&b": curve}, levels={"chance": 2.0})
    page = Page(chart)
    assert "Loss <b>" in page.text
    assert "200 images a&b: 3" in page.text
    assert "a&b: not finite" in page.text
    assert len(re.findall("<polyline", chart)) == 2
    assert line_chart("nothing", {"a": Curve(np.array([1.0]), np.array([np.nan]))}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00041, "0.00041"), (3.8123, "3.81"), (12345, "12,345"), (2.5e6, "2.5M"), (np.inf, "not finite")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_sheets_are_pictures(tmp_path):
    full_run(tmp_path)
    uris = re.findall(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=]+)", write_report(tmp_path).read_text())
    assert len(uris) == 1 + 2 + 2 * 3 * 3
    for uri in uris:
        Image.open(io.BytesIO(base64.b64decode(uri))).load()
