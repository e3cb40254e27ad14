"""MoCo v3, SimCLR, BYOL, SimSiam and NPID on two ranks are what they are on one: losses, gradients and what is remembered."""

from pathlib import Path

from .zygote import Zygote

CASES = 9


def test_two_ranks_are_one(zygote: Zygote, tmp_path: Path) -> None:
    found = zygote.cases("contrast_cases", 2, tmp_path)
    assert len(found) == CASES, sorted(found)
    for case, gaps in found.items():
        assert max(gaps[name] for name in ("loss", "gradient", "state")) < 1e-12, (case, gaps)
        assert gaps["moved"] > 0.01, (case, "else nothing was compared")
