"""Probes that a recipe names: the same numbers as each alone, chance beside them, reasons for what cannot be asked."""

from __future__ import annotations

import pytest
import torch
from gristmill.ops.evaluate.chosen import Asked, chance, measure
from gristmill.ops.evaluate.probes import chance_levels, label_free, run_probes
from gristmill.ops.evaluate.purity import neighbour_purity
from gristmill.ops.recipe import ProbeName, RecipeError, load_recipe
from torch import Tensor

LEVELS = ["coarse", "fine"]
ALL: tuple[ProbeName, ...] = ("knn", "retrieval", "purity", "linear", "label_free", "correspondence")


def rows(seed: int, count: int, wide: int = 12) -> Tensor:
    return torch.randn(count, wide, generator=torch.Generator().manual_seed(seed))


def codes(count: int) -> Tensor:
    fine = torch.arange(count) % 6
    return torch.stack([fine // 3, fine], 1)


def asked(seed: int = 0, informed: bool = False) -> Asked:
    known, wanted = codes(240), codes(120)
    one, other = rows(seed, 240), rows(seed + 1, 120)
    if informed:
        one, other = one + 4 * torch.eye(12)[known[:, 1]], other + 4 * torch.eye(12)[wanted[:, 1]]
    return Asked(one, known, other, wanted, LEVELS, k=10)


def test_each_is_what_it_is_alone():
    it = asked(informed=True)
    found, cost = measure(ALL, it, lambda: {"correspondence_cell": 0.5})
    plain = run_probes(it.rows, it.codes, it.query, it.query_codes, LEVELS, k=10)
    assert it.query is not None
    assert plain.items() <= found.items()
    assert label_free(it.query, k=10).items() <= found.items()
    fine = (torch.as_tensor(each)[:, 1] for each in (it.codes, it.query_codes))
    known, wanted = fine
    assert found["fine_purity"] == neighbour_purity(it.rows, known, it.query, wanted, k=10)
    assert found["fine_linear"] > 0.95
    assert found["correspondence_cell"] == 0.5
    assert set(cost) == set(ALL)
    assert measure(ALL, it, lambda: {"correspondence_cell": 0.5})[0] == found


def test_features_that_know_nothing_lie_at_chance():
    numbers = [measure(("knn", "purity", "linear"), asked(seed))[0] for seed in range(0, 20, 2)]
    expected = chance(("knn", "purity", "linear"), asked())
    assert expected.keys() == numbers[0].keys()
    for name, level in expected.items():
        mean = sum(each[name] for each in numbers) / len(numbers)
        assert abs(mean - level) < 4 * (level * (1 - level) / 1200) ** 0.5 + 0.02, name


def test_only_what_is_asked_is_there():
    it = asked()
    assert set(measure(("purity",), it)[0]) == {"coarse_purity", "fine_purity"}
    assert list(measure(("retrieval",), it)[0]) == ["fine_retrieval"]
    assert chance(("knn", "retrieval"), it) == chance_levels(it.codes, it.query_codes, LEVELS)


def test_what_cannot_be_asked_says_why():
    it = asked()
    alone = Asked(it.rows, it.codes, None, None, LEVELS, k=10)
    found, _ = measure(("linear", "correspondence", "knn"), alone)
    assert "held-out" in found.skipped["fine_linear"]
    assert "not at hand" in found.skipped["correspondence_cell"]
    assert "coarse_knn" in found
    one_class = Asked(it.rows, torch.zeros(240, 2), it.query, torch.zeros(120, 2), LEVELS)
    found, _ = measure(("purity", "linear"), one_class)
    assert not found
    assert "nothing to tell apart" in found.skipped["fine_linear"]
    strange = Asked(it.rows, codes(240).clamp(max=1), it.query, it.query_codes, LEVELS)
    assert "not among the references" in measure(("linear",), strange)[0].skipped["fine_linear"]


def test_without_labels_signs_of_collapse_stand_for_all_that_read_them():
    it = Asked(rows(0, 60), None, rows(1, 30), None, [], k=10)
    found, _ = measure(("knn", "linear", "correspondence"), it, lambda: {"correspondence_cell": 0.25})
    assert it.query is not None
    assert found == {**label_free(it.query, k=10), "correspondence_cell": 0.25}
    assert list(chance(("knn",), it)) == ["neighbour_agreement"]


def test_a_recipe_names_them_and_a_wrong_one_is_refused():
    recipe = load_recipe("demo", ["probes.names=[knn, purity]", "probes.every=1000"])
    assert recipe.probes.names == ("knn", "purity")
    for wrong in ("probes.names=[knnn]", "probes.names=[]", "probes.every=0"):
        with pytest.raises(RecipeError, match=r"probes\.(names|every)"):
            load_recipe("demo", [wrong])
