"""Files of weights are data: nothing in them is executed, and what is broken is refused with its name."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.models.unpickle import WeightsError, read_weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_executed(tmp_path: Path, zipped: bool):
    trap = tmp_path / "sprung"
    torch.save({"a": torch.ones(1), "b": Trap(trap)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"x\.pth is refused: its pickle asks for posix\.mkdir"):
        read_weights(tmp_path / "x.pth")
    assert not trap.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert trap.exists()  # the trap works


def test_all_globals_are_named(tmp_path: Path):
    torch.save({"best": np.float64(3), "net": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"numpy\.\S+scalar, .*torch\.nn\.modules\.linear\.Linear.*as safetensors"):
        read_weights(tmp_path / "x.pth")


class Registered:
    """A class that somebody else's code allowed for the whole process."""


def test_what_others_allowed_is_not_allowed_here(tmp_path: Path):
    torch.save({"a": Registered()}, tmp_path / "x.pth")
    with torch.serialization.safe_globals([Registered]):
        assert isinstance(torch.load(tmp_path / "x.pth", weights_only=True)["a"], Registered)
        with pytest.raises(WeightsError, match=r"asks for \S+\.Registered"):
            read_weights(tmp_path / "x.pth")
        assert isinstance(torch.load(tmp_path / "x.pth", weights_only=True)["a"], Registered)


@pytest.mark.parametrize("good", [True, False])
def test_the_allowed_global_is_allowed_here_only(tmp_path: Path, good: bool):
    path = tmp_path / "x.pth"
    torch.save({"args": argparse.Namespace(lr=1), "a": torch.ones(2) if good else Trap(tmp_path / "sprung")}, path)
    before = torch.serialization.get_safe_globals()
    if good:
        assert read_weights(path).tree["args"] == argparse.Namespace(lr=1)
    else:
        with pytest.raises(WeightsError):
            read_weights(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)
    assert argparse.Namespace not in before


def test_what_is_no_file_of_weights(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"no\.pth: there is no such file"):
        read_weights(tmp_path / "no.pth")
    with pytest.raises(WeightsError, match="is a folder; name the file"):
        read_weights(tmp_path)
    for content in (b"", b"hello, this is text", b"\x80", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{}"):
        (tmp_path / "x").write_bytes(content)
        if content.endswith(b"{}"):  # a header cut short
            with pytest.raises(WeightsError, match="damaged or no safetensors"):
                read_weights(tmp_path / "x")
        else:
            with pytest.raises(WeightsError, match="not a checkpoint"):
                read_weights(tmp_path / "x")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@given(data=st.data())
def test_damage_is_refused_or_seen_in_the_digest(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
):
    """Cut anywhere or with any byte changed: WeightsError, or a file of other weights, never another exception."""
    folder = tmp_path_factory.mktemp("x")
    path = folder / "x"
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"model": state, "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=kind == "zip"
        )
    whole, content = read_weights(path), bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        assert read_weights(path).sha256 != whole.sha256
    except WeightsError as error:
        assert str(path) in str(error)  # noqa: PT017
