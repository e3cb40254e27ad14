"""Checkpoints: any ranges in, any ranges out; damage is seen, named and passed over by all ranks alike."""

import json
import os
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.student import Student
from gristmill.ops.checkpoint import (
    CheckpointError,
    Content,
    Part,
    Saved,
    compose,
    digest_of,
    lay_out,
    newest,
)
from gristmill.ops.evaluate.online import load_teacher
from gristmill.ops.recipe import load_recipe
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from ..ranks import run_ranks


def split(tensors: dict[tuple[str, str], Tensor], world: int, cuts: Callable[[int], list[int]]) -> list[Content]:
    """Each tensor cut at `cuts(size)` (world - 1 places), a piece to each rank."""
    contents = [Content() for _ in range(world)]
    for (group, name), tensor in tensors.items():
        edges = [0, *cuts(tensor.numel()), tensor.numel()]
        for content, (start, stop) in zip(contents, pairwise(edges), strict=True):
            content.parts.append(Part(group, name, start, tuple(tensor.shape), tensor.reshape(-1)[start:stop]))
    return contents


def write(store: LocalStore, position: int, contents: list[Content], keep: int = 9) -> Path:
    writers = [Writer(store, rank, len(contents), keep) for rank in range(len(contents))]
    for writer, content in zip(writers, contents, strict=True):
        writer.begin(position, content)
    for settled in run_ranks(len(contents), lambda rank, total: writers[rank].finish(total)):
        assert settled.failure is None
    return store.root / f"{position:012d}"


def example(value: float, size: int = 1000) -> list[Content]:
    """Two ranks' content."""
    contents = split({("student", "w"): torch.full((size,), value)}, 2, lambda n: [n // 3])
    contents[0].whole, contents[0].state = {"objectives": {"queue": torch.full((99,), value)}, "empty": {}}, {"n": [1]}
    return contents


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaNs too."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b) if t.numel()]
    return a.dtype == b.dtype and a.shape == b.shape and (not bits or torch.equal(*bits))


KINDS = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8]


@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(KINDS)),
        max_size=5,
    ),
    draw=st.data(),
    world=st.integers(1, 3),
    readers=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_ranges_in_any_ranges_out(tmp_path_factory, shapes, draw, world, readers):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (shape, kind) in shapes.items():
        raw = torch.randint(0, 2 if kind == torch.bool else 256, (*shape, kind.itemsize), generator=generator)
        tensors["exp_avg", name] = raw.to(torch.uint8).view(kind).reshape(shape)

    def cuts(size: int, count: int = world) -> list[int]:
        return sorted(draw.draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1)))

    contents = split(tensors, world, cuts)
    contents[0].whole = {"same": {name: tensor for (_, name), tensor in tensors.items()}}
    store = LocalStore(tmp_path_factory.mktemp("any"))
    write(store, 7, contents)
    answers = run_ranks(readers, lambda rank, total: newest(store, rank, readers, total))
    for (_, name), tensor in tensors.items():
        edges = [0, *cuts(tensor.numel(), readers), tensor.numel()]
        pieces = [
            saved.read("exp_avg", name, start, stop)
            for (saved, _), (start, stop) in zip(answers, pairwise(edges), strict=True)
        ]
        assert same(torch.cat(pieces).view(tensor.shape), tensor)
    saved, told = answers[0]
    assert told == []
    for group in ["same", *saved.groups()]:
        assert saved.assembled(group).keys() == shapes.keys()
        for name, tensor in saved.assembled(group).items():
            assert same(tensor, tensors["exp_avg", name])


def test_the_layout_is_the_librarys():
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(2.5), "none": torch.zeros(0, 4), "ü": torch.ones(1)}
    assert b"".join(lay_out(tensors).chunks()) == save(tensors)
    assert b"".join(lay_out({}).chunks()) == save({})
    mixed = {f"{i}": torch.ones(3, dtype=kind) for i, kind in enumerate(KINDS)}
    back = load(b"".join(lay_out(mixed).chunks()))
    assert all(same(back[name], tensor) for name, tensor in mixed.items())
    turned = torch.arange(6.0).view(2, 3).T
    assert same(load(b"".join(lay_out({"t": turned}).chunks()))["t"], turned.contiguous())
    with pytest.raises(CheckpointError, match="complex64"):
        lay_out({"z": torch.zeros(1, dtype=torch.complex64)})


def test_what_is_read_is_a_copy_and_outlives_the_files(tmp_path: Path):
    store = LocalStore(tmp_path)
    write(store, 64, example(1.0))
    saved = Saved(store, 64)
    first, whole = saved.read("student", "w", 300, 400), saved.whole("objectives")["queue"]
    first += 1
    assert saved.whole("empty") == saved.assembled("empty") == {}
    assert torch.equal(saved.read("student", "w", 300, 400), torch.ones(100))
    store.remove(64)
    assert torch.equal(whole, torch.ones(99))
    assert saved.state == {"n": [1]}
    assert (saved.groups(), sorted(saved.wholes())) == (["student"], ["empty", "objectives"])
    assert saved.names("student") == {"w": (1000,)}


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (lambda saved: saved.read("teacher", "w"), "no group 'teacher'"),
        (lambda saved: saved.read("student", "v"), "no tensor 'v'"),
        (lambda saved: saved.read("student", "w", 900, 1001), "1000 elements"),
        (lambda saved: saved.whole("student"), "no whole 'student'"),
        (lambda saved: saved.assembled("nothing"), "no group 'nothing'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, ask: Callable[[Saved], Any], word: str):
    store = LocalStore(tmp_path)
    write(store, 64, example(1.0))
    with pytest.raises(CheckpointError, match=word):
        ask(Saved(store, 64))


@pytest.mark.parametrize(
    ("ranges", "word"),
    [
        ([(0, 4), (6, 10)], "elements 4 to 6 of g w are held by no rank"),
        ([(0, 6), (5, 10)], "elements 5 to 6 of g w are held twice"),
        ([(0, 9)], "elements 9 to 10 of g w are held by no rank"),
        ([], "elements 0 to 10"),
    ],
)
def test_gaps_and_overlaps_are_refused(ranges: list[tuple[int, int]], word: str):
    note = {"tensors": [["g", "w", "F32", [10]]], "digests": {}, "bytes": 0, "whole": {}}
    notes = [{**note, "index": [["g", "w", start, stop, "f"]]} for start, stop in ranges] or [{**note, "index": []}]
    with pytest.raises(CheckpointError, match=word):
        compose(1, notes, "{}")
    assert json.loads(compose(1, [{**note, "index": [["g", "w", 0, 10, "f"]]}], '{"a": 1}'))["state"] == {"a": 1}
    with pytest.raises(CheckpointError, match="disagree"):
        compose(1, [{**note, "index": []}, {**note, "tensors": [["g", "w", "F32", [5, 2]]], "index": []}], "{}")


def test_nothing_there(tmp_path: Path):
    assert newest(LocalStore(tmp_path / "absent")) == (None, [])
    answers = run_ranks(3, lambda rank, total: newest(LocalStore(tmp_path / "absent"), rank, 3, total))
    assert answers == [(None, [])] * 3


def seal(folder: Path, text: str) -> None:
    """A state.json that matches its digest."""
    (folder / "state.json").write_text(text)
    (folder / "state.digest").write_text(digest_of(text.encode()))


def zero(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size - 100)
        handle.write(bytes(64))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zeroed bytes": (lambda f: zero(f / "rank-00001.safetensors"), r"rank-00001\.safetensors does not match"),
    "zeroed whole": (lambda f: zero(f / "whole-objectives.safetensors"), r"whole-objectives\.safetensors does not"),
    "cut": (lambda f: os.truncate(f / "rank-00000.safetensors", 500), r"rank-00000\.safetensors does not match"),
    "missing": (lambda f: (f / "rank-00001.safetensors").unlink(), r"rank-00001\.safetensors is missing"),
    "torn state": (lambda f: os.truncate(f / "state.json", 200), r"state\.json does not match"),
    "edited": (lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("1", "2")), "not match"),
    "no state": (lambda f: (f / "state.json").unlink(), r"state\.json or state\.digest is missing"),
    "no digest": (lambda f: (f / "state.digest").unlink(), r"state\.json or state\.digest is missing"),
    "version": (lambda f: seal(f, '{"version": 1, "digests": {}, "position": 128}'), r"state\.json has version 1"),
    "foreign": (lambda f: seal(f, "[]"), r"state\.json is no checkpoint's"),
    "moved": (lambda f: seal(f, (f / "state.json").read_text().replace("128", "64")), "belongs to another folder"),
    "path": (lambda f: seal(f, (f / "state.json").read_text().replace('"whole-e', '"../whole-e')), "another folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(tmp_path: Path, fault: str):
    store = LocalStore(tmp_path)
    write(store, 64, example(1))
    newer = write(store, 128, example(2))
    damage, named = FAULTS[fault]
    damage(newer)
    for world in (1, 3):
        for answer in run_ranks(world, lambda rank, total, world=world: newest(store, rank, world, total)):
            saved, told = answer
            assert saved.position == 64
            assert torch.equal(saved.assembled("student")["w"], torch.ones(1000))
            assert len(told) == 1
            assert "passed over" in told[0]
            assert re.search(named, told[0]), told


def test_all_damaged_is_an_error_with_a_remedy_on_all_ranks(tmp_path: Path):
    store = LocalStore(tmp_path)
    for position in (64, 128):
        (write(store, position, example(1)) / "rank-00000.safetensors").unlink()
    for world in (1, 3):
        for error in run_ranks(world, lambda rank, total, world=world: newest(store, rank, world, total)):
            assert isinstance(error, CheckpointError)
            assert "rank-00000.safetensors is missing" in str(error)
            assert f"Remove {tmp_path}" in str(error)


def test_all_damaged_is_told_in_a_line_a_checkpoint(tmp_path: Path):
    store = LocalStore(tmp_path)
    for position in (64, 128, 192):
        for file in write(store, position, example(3)).glob("*.safetensors"):
            file.unlink()
    with pytest.raises(CheckpointError) as caught:
        newest(store)
    first, *lines, last = str(caught.value).splitlines()
    assert first == "no checkpoint is readable:"
    assert [re.findall(r"^  checkpoint .*/0*(\d+) is damaged", line) for line in lines] == [["192"], ["128"], ["64"]]
    for line in lines:
        assert line.count(" is missing") == 2
        assert re.search(r"; and (\d+) more of (\d+) files\) and was passed over$", line)
    assert last == f"Remove {tmp_path} to start from the beginning."


def test_the_newest_up_to_a_position(tmp_path: Path):
    store = LocalStore(tmp_path)
    for position in (64, 128, 10**12 + 5):
        write(store, position, example(position))
    found = [newest(store, at_most=most)[0] for most in (None, 10**12, 128, 127, 63)]
    assert [saved and saved.position for saved in found] == [10**12 + 5, 128, 128, 64, None]


def test_ranks_agree_although_one_sees_an_old_listing(tmp_path: Path):
    store = LocalStore(tmp_path)
    write(store, 64, example(1))
    write(store, 128, example(2))

    class Stale(LocalStore):
        def positions(self) -> list[int]:
            return [64]

    stores = [store, Stale(tmp_path), LocalStore(tmp_path)]
    answers = run_ranks(3, lambda rank, total: newest(stores[rank], rank, 3, total))
    assert [saved.position for saved, _ in answers] == [128] * 3


def test_a_folder_that_one_rank_cannot_see_is_no_ones(tmp_path: Path):
    store = LocalStore(tmp_path / "seen")
    write(store, 64, example(1))
    stores = [store, LocalStore(tmp_path / "elsewhere")]
    errors = run_ranks(2, lambda rank, total: newest(stores[rank], rank, 2, total))
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert "another rank could not read it" in str(errors[0])
    assert "is missing" in str(errors[1])


def test_no_pickle_is_executed(tmp_path: Path):
    store = LocalStore(tmp_path)
    folder = write(store, 64, example(1))
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    data = pickle.dumps(Bomb())
    name = "rank-00000.safetensors"
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        newest(store)
    text = (folder / "state.json").read_text()  # even where somebody forged the digests, too
    seal(folder, text.replace(json.loads(text)["digests"][name], digest_of(data)))
    saved, _ = newest(store)
    assert saved is not None
    with pytest.raises(CheckpointError, match=name):
        saved.read("student", "w")
    assert not marker.exists()


def test_a_teacher_comes_back_from_its_averages(tmp_path: Path):
    recipe = load_recipe("demo", ["data=nowhere", "student.depth=1"], tiny=True)
    student = Student(recipe.student, seed=9)
    named = {("teacher", n): p.detach() for n, p in student.named_parameters() if p.requires_grad}
    contents = split(named, 2, lambda n: [n // 2])
    contents[0].whole = {"buffers": {f"teacher/{n}": b for n, b in student.named_buffers()}}
    write(LocalStore(tmp_path / "checkpoints"), 64, contents)
    teacher, position = load_teacher(tmp_path, recipe)
    assert position == 64
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    for name, value in teacher.state_dict().items():
        assert name not in trained or torch.equal(value, student.state_dict()[name]), name
    for content in contents:
        content.parts = [part for part in content.parts if not part.name.endswith("norm.bias")]
    write(LocalStore(tmp_path / "checkpoints"), 128, contents)
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        load_teacher(tmp_path, recipe)
