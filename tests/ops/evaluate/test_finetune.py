"""Fine-tuning: groups and steps are timm's and torch's, settings are the papers', and a tiny network learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from gristmill.models import build_backbone
from gristmill.ops.evaluate.augmented import MIX, drawn, transform
from gristmill.ops.evaluate.drop_path import DropPath
from gristmill.ops.evaluate.eyes import TimmEye, VitEye
from gristmill.ops.evaluate.finetune import (
    Classifier,
    FinetuneError,
    FinetuneOptions,
    Finetuning,
    even_batches,
    run_finetune,
    run_semi_finetune,
)
from gristmill.ops.evaluate.layer_decay import LayersError, layer_groups
from gristmill.ops.evaluate.linear import LinearOptions, run_linear
from gristmill.ops.evaluate.pictures import open_pictures
from gristmill.ops.evaluate.presets import FINETUNE, LINEAR, finetune_preset
from gristmill.ops.evaluate.subject import Subject
from gristmill.ops.evaluate.subsets import draw_balanced
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from .labelled import Coloured

MEASURES: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# What the test sets need: rates that move something in a few steps, and no noise that they cannot average out.
QUICK = FinetuneOptions(
    epochs=12, batch=32, rate=3e-3, warmup_epochs=2, layer_decay=0.9, drop_path=0.1, augment="crop", mixup=0.0,
    cutmix=0.0, head_scale=1.0, evaluate_every=6,
)  # fmt: skip


def tiny(seed: int = 0) -> Subject:
    return Subject("tiny", VitEye(build_backbone("vit_tiny_patch16_224", **MEASURES, seed=seed)), 24)


def timms(classes: int = 0) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **MEASURES, num_classes=classes)


def test_layer_groups_are_timms():
    net = timms(4)
    theirs = param_groups_layer_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.55)
    wanted = {id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    eye = TimmEye(timms(), 24)
    head = nn.Linear(48, 4)
    ours = layer_groups(eye.layers(), eye, head.parameters(), decay=0.55, weight_decay=0.05)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in ours for p in group["params"]}
    names = {
        **{f"net.{n}": p for n, p in eye.net.named_parameters()},
        **{f"net.head.{n}": p for n, p in head.named_parameters()},
    }
    assert len(names) == len(found) == len(wanted)
    for name, parameter in net.named_parameters():
        assert found[id(names[f"net.{name}"])] == pytest.approx(wanted[id(parameter)]), name
    scales = [group["lr_scale"] for group in ours]
    assert scales == sorted(scales)
    assert scales[0] == pytest.approx(0.55**3)
    assert scales[-1] == 1.0


def test_layers_that_forget_a_parameter_are_refused():
    eye = VitEye(build_backbone("vit_tiny_patch16_224", **MEASURES))
    layers = eye.layers()
    for wrong in (layers[1:], [*layers, layers[0]]):
        with pytest.raises(LayersError, match="each parameter"):
            layer_groups(wrong, eye, [], decay=0.5, weight_decay=0.0)


def test_steps_are_a_plain_loop():
    """Two steps against timm's network, groups, mixing and loss and torch's AdamW, put together by hand."""
    options = FinetuneOptions(epochs=2, batch=8, drop_path=0.0, layer_decay=0.6, head_scale=1.0)
    eye = TimmEye(timms(), 24)
    model = Classifier(eye.double(), 48, 4, scale=1.0, seed=1)
    net = timms(4).double()
    net.load_state_dict({**eye.net.state_dict(), **{f"head.{k}": v for k, v in model.head.state_dict().items()}})
    model.double()
    work = Finetuning(model, eye.layers(), options, seed=3)
    groups = param_groups_layer_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay(), layer_decay=0.6)
    optimizer = torch.optim.AdamW(groups)
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    draws = torch.Generator().manual_seed(0)
    for step, rate in enumerate((1e-3, 5e-4)):
        images = torch.randn(8, 3, 24, 24, generator=draws, dtype=torch.float64)
        labels = torch.randint(4, (8,), generator=draws)
        with drawn(3, MIX, 0, step):
            mixed, targets = mix(images.clone(), labels)
        net.train()
        loss = SoftTargetCrossEntropy()(net(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        torch.testing.assert_close(work.step(images, labels, rate, step), loss.detach(), rtol=1e-12, atol=1e-12)
    for name, wanted in net.named_parameters():
        got = dict(model.head.named_parameters(prefix="head"), **dict(eye.net.named_parameters()))[name]
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_the_schedule_is_beits():
    options = FinetuneOptions(epochs=10, rate=2e-3, warmup_epochs=3, warmup_rate=1e-6, min_rate=1e-5)
    wanted = np.concatenate(
        [
            np.linspace(1e-6, 2e-3, 12),
            [1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + np.cos(np.pi * i / 28)) for i in range(28)],
        ]
    )
    assert [options.rate_at(step, 40, 4, 64) for step in range(40)] == pytest.approx(wanted.tolist())
    scaled = FinetuneOptions(rate=1e-3, rate_per=512, warmup_epochs=0)
    assert scaled.rate_at(0, 40, 4, 128) == pytest.approx(2.5e-4)


def test_drop_path_is_the_same_for_both_kinds_of_block():
    ours = VitEye(build_backbone("vit_tiny_patch16_224", **MEASURES, pos_interp="timm"))
    theirs = timms()
    theirs.load_state_dict(ours.net.state_dict())
    eyes = ours, TimmEye(theirs, 24)
    images = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = ours(images)
    drops = [DropPath(eye, 0.5, seed=1) for eye in eyes]

    def dropped(step: int) -> list[torch.Tensor]:
        found = []
        for eye, drop in zip(eyes, drops, strict=True):
            with drop.drawn(16, step, "cpu"):
                found.append(eye(images))
        return found

    first, again, second = dropped(0), dropped(0), dropped(1)
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-5)
    assert first[0].equal(again[0])
    assert not first[0].equal(second[0])
    assert not first[0].equal(whole)
    # The first block keeps its branches, the last one loses or doubles each of them, sample by sample.
    net = ours.net
    tokens = net.blocks[0](net._pos_embed(net._embed(images)))
    each = [
        net.norm(net.blocks[1](tokens, scale=torch.tensor([[a, m]]).repeat(16, 1)))
        for a in (0.0, 2.0)
        for m in (0.0, 2.0)
    ]
    fits = torch.stack([(first[0] - kept).abs().amax((1, 2)) < 1e-4 for kept in each])
    assert fits.sum(0).tolist() == [1] * 16
    assert int(fits.any(1).sum()) >= 3  # of four ways; 16 samples miss two of them once in 10,000 times
    torch.testing.assert_close(ours(images), whole)  # outside, nothing is dropped
    for drop in drops:
        drop.close()
    with drops[0].drawn(16, 0, "cpu"):
        torch.testing.assert_close(ours(images), whole)


def test_a_tiny_network_learns_four_colours():
    calls: list[tuple[int, int, float]] = []
    train = Coloured(64)
    got = run_finetune(tiny(), train, Coloured(40, seed=1), QUICK, seed=0, progress=lambda *c: calls.append(c))
    assert got["finetune_top1"] == got["finetune_top1_best_epoch"] == 1.0
    assert got["finetune_top5"] == 1.0
    assert got["finetune_images"] == 64
    assert got["finetune_best_epoch"] in (6, 12)
    assert [call[:2] for call in calls] == [(step, 24) for step in range(1, 25)]
    assert calls[-1][2] < 0.8 * calls[0][2]


def test_labels_that_say_nothing_are_not_learned():
    got = run_finetune(
        tiny(), Coloured(64, tell=False), Coloured(400, seed=1, tell=False), replace(QUICK, epochs=6), seed=0
    )
    assert abs(got["finetune_top1"] - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_the_seed_alone_decides():
    options = FinetuneOptions(epochs=2, batch=10, drop_path=0.3, warmup_epochs=0, rate=1e-3)
    subject, train, query = tiny(), Coloured(23, broken=(4,)), Coloured(20, seed=1)
    before = subject.features(torch.ones(1, 3, 24, 24))
    losses: dict[int, list[float]] = {}
    answers = []
    for number, (workers, seed) in enumerate(((0, 0), (2, 0), (0, 1))):
        torch.manual_seed(number)
        seen = losses.setdefault(number, [])
        again = replace(options, workers=workers)
        answers.append(run_finetune(subject, train, query, again, seed=seed, progress=lambda s, n, x, seen=seen: seen.append(x)))  # fmt: skip
    assert losses[0] == losses[1]
    assert answers[0] == answers[1]
    assert losses[0] != losses[2]
    assert answers[0]["finetune_images"] <= 22  # the broken one is left out
    assert subject.features(torch.ones(1, 3, 24, 24)).equal(before)


def test_few_labels():
    train, query = Coloured(80), Coloured(40, seed=1)
    short = replace(QUICK, epochs=2)
    got = run_semi_finetune(tiny(), train, query, short, seed=0, shares=(0.05, 0.5))
    assert got["semi_finetune_5_images"] == len(draw_balanced(train.labels, 0.05, 0)) == 4
    assert got["semi_finetune_50_images"] == 40
    alone = run_finetune(tiny(), train, query, short, seed=0, rows=draw_balanced(train.labels, 0.5, 0))
    assert {key.replace("semi_finetune_50", "finetune"): v for key, v in got.items() if "_50_" in key} == alone


def test_a_loss_that_is_not_finite_stops():
    options = FinetuneOptions(epochs=3, batch=16, rate=1e30, warmup_epochs=0, drop_path=0.0, augment="crop")
    with pytest.raises(FinetuneError, match="smaller rate"):
        run_finetune(tiny(), Coloured(32), Coloured(8), options)


def test_pictures_that_cannot_be_used():
    with pytest.raises(FinetuneError, match="at least 2"):
        run_finetune(tiny(), Coloured(8), Coloured(8), QUICK, rows=torch.tensor([3]))
    with pytest.raises(FinetuneError, match="can be read"):
        run_finetune(tiny(), Coloured(8, broken=tuple(range(8))), Coloured(8), QUICK)


def test_a_folder_of_pictures(tmp_path: Path):
    """The real thing: files, two processes that read them, and one file that does not decode."""
    for part, made in (("train", Coloured(24)), ("query", Coloured(16, seed=1))):
        for row, code in enumerate(made.labels.tolist()):
            folder = tmp_path / part / made.classes[code]
            folder.mkdir(parents=True, exist_ok=True)
            made.load(row).save(folder / f"{row}.png")
    torn = tmp_path / "train" / "red" / "0.png"
    torn.write_bytes(torn.read_bytes()[:200])
    train, query = (open_pictures(str(tmp_path / part)) for part in ("train", "query"))
    options = replace(QUICK, epochs=10, batch=8, evaluate_every=10, drop_path=0.0)
    got = [run_finetune(tiny(), train, query, replace(options, workers=n), seed=0) for n in (0, 2)]
    assert got[0] == got[1]
    assert got[0]["finetune_images"] == 23
    assert got[0]["finetune_top1"] > 0.9
    probed = run_linear(tiny(), train, query, LinearOptions(epochs=5, batch=8, augment="crop", workers=1))
    assert probed["linear_top1"] > 0.9


@given(st.integers(2, 200), st.integers(2, 64))
def test_even_batches(rows: int, batch: int):
    found = even_batches(torch.arange(rows), batch)
    sizes = [len(part) for part in found]
    assert all(size % 2 == 0 and 0 < size <= batch for size in sizes)
    assert max(sizes) - min(sizes) <= 2
    assert rows - sum(sizes) <= len(sizes)
    kept = torch.cat(found)
    assert kept.equal(kept.unique())


def test_presets_are_the_papers():
    """reference/mugs.md, 4, and the scripts that it names."""
    fine = {name: FINETUNE[f"vit_{name}"] for name in "sbl"}
    assert {n: (o.epochs, o.rate, o.layer_decay, o.drop_path, o.batch, o.warmup_epochs) for n, o in fine.items()} == {
        "s": (200, 0.0012, 0.55, 0.1, 1024, 20),
        "b": (100, 0.0012, 0.55, 0.2, 1024, 20),
        "l": (50, 0.0008, 0.75, 0.3, 512, 5),
    }
    for o in fine.values():
        assert (o.weight_decay, o.mixup, o.cutmix, o.smoothing, o.erase, o.min_rate) == (
            0.05,
            0.8,
            1.0,
            0.1,
            0.25,
            1e-6,
        )
        assert (o.rate_per, o.policy, o.augment, o.pool) == (None, "rand-m9-mstd0.5-inc1", "strong", "class")
    semi = FINETUNE["semi_s"]
    assert (semi.epochs, semi.rate, semi.rate_per, semi.weight_decay, semi.erase) == (1000, 5e-6, 512, 0.05, 0.25)
    rates = {"s": (3e-6, 7.5e-6, 3e-5, 7.5e-5, 7.5e-5, 1.5e-4), "b": (7.5e-6, 7.5e-6, 1.5e-5, 3e-5, 7.5e-5, 1.5e-4)}
    for size, wanted in rates.items():
        sets = [FINETUNE[f"{name}_{size}"] for name in ("cifar10", "cifar100", "inat18", "inat19", "flowers", "cars")]
        assert tuple(o.rate for o in sets) == wanted
        assert [o.epochs for o in sets] == [1000, 1000, 360, 360, 1000, 1000]
        assert {(o.batch, o.rate_per, o.erase) for o in sets} == {(768, 512, 0.1)}
    linear = {n: (o.rates, o.min_rate, o.batch, o.blocks, o.average) for n, o in LINEAR.items() if n != "mugs_l"}
    assert linear == {
        "dino_s": ((0.001,), 0.0, 1024, 4, False),
        "dino_b": ((0.001,), 0.0, 1024, 1, True),
        "mugs_s_100": ((0.015,), 1e-5, 1024, 4, False),
        "mugs_s_300": ((0.02,), 0.0, 1024, 4, False),
        "mugs_s_800": ((0.01,), 0.0, 1024, 4, False),
        "mugs_b": ((0.002,), 1e-5, 512, 1, True),
    }
    large = LINEAR["mugs_l"]
    assert (len(large.rates), len(large.weight_decays), large.blocks, large.average) == (36, 5, 1, True)
    assert {(o.epochs, o.momentum) for o in LINEAR.values()} == {(100, 0.9)}
    assert finetune_preset(tiny()) == FINETUNE["vit_s"]


def test_the_strongest_posterising_leaves_a_picture():
    """timm asks Pillow for 0 bits there, which it refuses."""
    change = transform("strong", 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), policy="rand-m10-mstd0-inc1", erase=0.0)
    (policy,) = (step for step in change.transforms if hasattr(step, "ops"))
    picture = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    for operation in policy.ops:
        operation.prob = 1.0
        if operation.name.startswith("Posterize"):
            assert len(np.unique(np.asarray(operation(picture)))) == 2
        operation(picture)
