"""The benchmark of selected contrast: both ways run at small sizes, and a way says what it took."""

import json
from dataclasses import asdict

import pytest
import torch
from gristmill.ops.bench.selective_forms import Sizes, form, main

SMALL = Sizes(images=4, queue=64, levels=(12, 6, 3), dim=8, locals=2, seconds=0.0, threads=torch.get_num_threads())


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_a_way_is_measured(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([way, json.dumps(asdict(SMALL))])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"seconds", "cpu_seconds", "memory_MB"}
    assert found["seconds"] > 0


def test_a_form_can_be_called_again() -> None:
    for fast in (True, False):
        run = form(fast, SMALL)
        run()
        run()
