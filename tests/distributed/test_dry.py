"""The dry run on two ranks: one that cannot read its part says why, the other says which one, and nobody waits."""

from pathlib import Path

from .guard_cases import make_data
from .zygote import Zygote


def test_a_rank_that_cannot_read_its_part(zygote: Zygote, tmp_path: Path):
    make_data(tmp_path, 48)
    group = zygote.group(tmp_path / "rank", "dry_cases", tmp_path)
    assert group.codes == [0, 0], group.errors
    assert [error.splitlines()[0] for error in group.errors] == ["sound True"] * 2
    assert "on rank 1; see what is said there" in group.errors[0]
    assert "rank-00001.safetensors" in group.errors[1]
    assert "cannot be read" in group.errors[1]
