"""The grid of linear heads is torch's own loop head by head, finds what scikit-learn finds, and nothing in noise."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.models import build_backbone
from gristmill.ops.evaluate.augmented import augmented_batches, shuffled, transform
from gristmill.ops.evaluate.eyes import VitEye
from gristmill.ops.evaluate.heads import LinearHeads
from gristmill.ops.evaluate.linear import LinearError, LinearOptions, joined, linear_probe, run_linear, same_codes
from gristmill.ops.evaluate.subject import Subject
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .labelled import MEAN, STD, Coloured


def clusters(seed: int, rows: int, *, spread: float = 1.0, classes: int = 5, dim: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.arange(rows) % classes
    return centres[labels] + spread * torch.randn(rows, dim, generator=draws, dtype=torch.float64), labels


def plain(heads: LinearHeads, head: int, rate: float) -> tuple[nn.Linear, torch.optim.SGD]:
    """torch's own layer and optimizer, starting where a head starts."""
    classes, width = heads.weight.shape[1:]
    layer = nn.Linear(width, classes, dtype=heads.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(heads.weight[head])
        layer.bias.copy_(heads.bias[head])
    decay = float(heads.decays[head])
    return layer, torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=decay)


def test_every_head_is_torchs_loop():
    x, labels = clusters(0, 70)
    heads = LinearHeads([0.0, 0.0, 0.01, 0.01], 5, 12, seed=3, dtype=torch.float64)
    rates = torch.tensor([0.01, 2.0, 0.01, 2.0], dtype=torch.float64)
    layers = [plain(heads, head, float(rate)) for head, rate in enumerate(rates)]
    counted = torch.ones(70, 4, dtype=torch.bool)
    counted[::3, 1:3] = False  # rows that two of the heads must not see
    for epoch in range(3):
        for rows in torch.arange(70).split(32):
            scale = 0.5**epoch
            losses = heads.step(x[rows], labels[rows], rates * scale, counted[rows])
            for head, (layer, optimizer) in enumerate(layers):
                seen = rows[counted[rows, head]]
                loss = nn.functional.cross_entropy(layer(x[seen]), labels[seen])
                optimizer.zero_grad()
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = float(rates[head]) * scale
                optimizer.step()
                torch.testing.assert_close(losses[head], loss.detach(), rtol=1e-12, atol=1e-12)
    for head, (layer, _) in enumerate(layers):
        torch.testing.assert_close(heads.weight[head], layer.weight.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(heads.bias[head], layer.bias.detach(), rtol=1e-11, atol=1e-12)
    score = heads.score(x, labels, rows=17)
    for head, (layer, _) in enumerate(layers):
        logits = layer(x).detach()
        assert float(score.top1[head]) == float((logits.argmax(1) == labels).double().mean())
        assert float(score.top5[head]) == 1.0
        torch.testing.assert_close(score.loss[head], nn.functional.cross_entropy(logits, labels), rtol=1e-9, atol=1e-9)


def test_the_whole_probe_is_a_plain_loop():
    x, labels = clusters(1, 90, spread=1.5)
    query, answers = clusters(2, 200, spread=1.5)
    options = LinearOptions(epochs=7, batch=32, rates=(0.8,), weight_decays=(0.001,), min_rate=0.01)
    got = linear_probe(x, labels, query, answers, options, seed=5)
    start = LinearHeads([0.001], 5, 12, seed=5, dtype=torch.float64)
    layer, optimizer = plain(start, 0, 0.8 * 32 / 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=0.01)
    for epoch in range(7):
        for rows in shuffled(torch.arange(90), 5, epoch).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    right = float((layer(query).argmax(1) == answers).double().mean())
    assert 0.5 < right < 1.0
    assert got["linear_top1"] == got["linear_top1_chosen_on_query"] == got["linear_top1@lr=0.8,wd=0.001"] == right
    assert (got["linear_lr"], got["linear_wd"]) == (0.8, 0.001)


def test_it_finds_what_scikit_learn_finds():
    x, labels = clusters(3, 400, spread=1.2)
    query, answers = clusters(4, 1000, spread=1.2)
    # Strong enough a penalty not to matter, weak enough to converge.
    theirs = LogisticRegression(C=10.0, max_iter=2000).fit(x.numpy(), labels.numpy()).score(query, answers)
    ours = linear_probe(x.float(), labels, query.float(), answers, LinearOptions(epochs=40), seed=0)
    assert 0.8 < theirs < 0.99
    assert abs(ours["linear_top1"] - theirs) < 0.02
    assert ours["linear_top1_chosen_on_query"] >= ours["linear_top1"]
    assert ours["linear_top1_chosen_on_query"] == max(v for k, v in ours.items() if "@" in k)
    assert ours["linear_top5"] == 1.0  # of five classes
    easy, _ = clusters(3, 400, spread=0.05)
    assert linear_probe(easy, labels, easy, labels, LinearOptions(epochs=20))["linear_top1"] == 1.0


def test_random_features_give_chance():
    draws = torch.Generator().manual_seed(0)
    x, query = torch.randn(500, 32, generator=draws), torch.randn(2000, 32, generator=draws)
    labels, answers = torch.arange(500) % 10, torch.arange(2000) % 10
    got = linear_probe(x, labels, query, answers, LinearOptions(epochs=10, average=True))
    five_sigma = 5 * math.sqrt(0.1 * 0.9 / 2000)
    assert abs(got["linear_top1"] - 0.1) < five_sigma
    assert abs(got["linear_top5"] - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_a_rate_that_diverges_harms_no_other_and_all_of_them_are_an_error():
    x, labels = clusters(5, 120)
    x = x.float()
    good = linear_probe(x, labels, x, labels, LinearOptions(epochs=5, batch=32, rates=(0.1, 1.0), weight_decays=(0.1,)))
    mixed = linear_probe(
        x, labels, x, labels, LinearOptions(epochs=5, batch=32, rates=(0.1, 1.0, 1e9), weight_decays=(0.1,))
    )
    assert mixed.pop("linear_top1@lr=1e+09,wd=0.1") == 0.0
    assert mixed == good
    with pytest.raises(LinearError, match="all rates diverged"):
        linear_probe(x, labels, x, labels, LinearOptions(epochs=5, batch=32, rates=(1e9,), weight_decays=(0.1,)))


def test_standardized_features_may_have_any_scale():
    x, labels = clusters(6, 150)
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    plainly, scaled = (
        linear_probe(v, labels, v, labels, LinearOptions(epochs=5, standardize=True))
        for v in (x, x * scale + 7 * scale)
    )
    assert scaled == plainly
    assert linear_probe(x * scale, labels, x * scale, labels, LinearOptions(epochs=5)) != plainly


def test_the_setting_is_chosen_without_the_queries():
    x, labels = clusters(7, 200)
    query, answers = clusters(8, 100)
    one = linear_probe(x, labels, query, answers, LinearOptions(epochs=5))
    other = linear_probe(x, labels, query, (answers + 1) % 5, LinearOptions(epochs=5))
    for name in ("linear_lr", "linear_wd", "linear_held_out_top1"):
        assert one[name] == other[name]
    assert other["linear_top1"] < 0.1 < one["linear_top1"]


def test_what_is_held_out_is_not_learned():
    draws = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 400, generator=draws), torch.arange(200) % 5  # nothing to find, all to remember
    got = linear_probe(x, labels, x, labels, LinearOptions(epochs=20, rates=(1.0,)))
    assert got["linear_top1"] == 1.0
    assert got["linear_held_out_top1"] < 0.6  # 20 images at chance .2: above it once in 10,000 draws


def test_progress_and_a_second_time():
    x, labels = clusters(9, 100)
    calls: list[tuple[int, int, float]] = []
    options = LinearOptions(epochs=3, batch=40)
    first = linear_probe(x, labels, x, labels, options, progress=lambda *call: calls.append(call))
    torch.manual_seed(7)
    assert linear_probe(x, labels, x, labels, options) == first
    assert [call[:2] for call in calls] == [(step, 9) for step in range(1, 10)]
    assert calls[-1][2] < calls[0][2]


def test_features_in_the_papers_order():
    seen = [(torch.full((2, 3), float(n)), torch.full((2, 4, 3), 10.0 + n)) for n in range(2)]
    assert joined(seen, False)[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert joined(seen, True)[0].tolist() == [0, 0, 0, 1, 1, 1, 11, 11, 11]


def numpys() -> list[int]:
    """The state of NumPy's global generator, and its place in it."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return [*state["state"]["key"].tolist(), state["state"]["pos"]]


@pytest.mark.parametrize("augment", ["crop", "strong"])
def test_pictures_are_altered_alike_by_any_number_of_workers(augment):
    pictures = Coloured(12)
    change = transform(augment, 24, MEAN.tolist(), STD.tolist())
    batches = [(4, rows) for rows in torch.tensor([3, 1, 11, 0, 7, 5, 2]).split(3)]
    before = random.getstate(), numpys(), torch.get_rng_state()
    found = [list(augmented_batches(pictures, batches, change, seed=1, workers=workers)) for workers in (0, 1, 2)]
    assert random.getstate() == before[0]
    assert numpys() == before[1]
    assert torch.get_rng_state().equal(before[2])
    for other in found[1:]:
        for (rows, images), (rows_too, images_too) in zip(found[0], other, strict=True):
            assert rows.equal(rows_too)
            assert images.equal(images_too)
    assert [rows.tolist() for rows, _ in found[0]] == [part.tolist() for _, part in batches]
    # Another batch makes no difference to a picture; another epoch or seed does.
    ((_, alone),) = augmented_batches(pictures, [(4, torch.tensor([7]))], change, seed=1)
    assert alone[0].equal(found[0][1][1][1])
    for seed, epoch in ((1, 5), (2, 4)):
        ((_, moved),) = augmented_batches(pictures, [(epoch, torch.tensor([7]))], change, seed=seed)
        assert not moved.equal(alone)


def tiny(seed: int = 0) -> Subject:
    net = build_backbone(
        "vit_tiny_patch16_224", img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=3, seed=seed
    )
    return Subject("tiny", VitEye(net), 24)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_a_subject_is_probed(augment):
    options = LinearOptions(epochs=6, batch=16, blocks=2, average=True, augment=augment, standardize=True)
    subject, train, query = tiny(), Coloured(48, broken=(5,)), Coloured(40, seed=1)
    got = run_linear(subject, train, query, options, seed=2)
    assert got["linear_top1"] > 0.9
    assert got == run_linear(subject, train, query, options, seed=2)
    if augment == "crop":
        assert got != run_linear(subject, train, query, options, seed=3)


def test_classes_are_matched_by_name():
    train, query = Coloured(8), Coloured(8)
    query.classes = ["blue", "red"]
    assert same_codes(train, query).tolist() == [2, 0]
    query.classes = ["blue", "mauve"]
    with pytest.raises(LinearError, match="mauve"):
        same_codes(train, query)


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"rates": (0.0,)}, {"epochs": 0}, {"held_out": 1.0}])
def test_settings_refused(wrong):
    with pytest.raises(LinearError):
        LinearOptions(**wrong)


def test_features_refused():
    x, labels = clusters(0, 20)
    with pytest.raises(LinearError, match="NaN"):
        linear_probe(torch.where(x > 1, torch.nan, x), labels, x, labels)
    with pytest.raises(LinearError, match="labels"):
        linear_probe(x, labels - 1, x, labels)
