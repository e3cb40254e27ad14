"""Selected negatives, streamed, against whole logits; and the random numbers that select them."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.bernoulli import keyed, uniform_block
from gristmill.objectives.contrast import streamed_logsumexp
from gristmill.objectives.hierarchy import HierarchyConfig, HierarchyObjective
from gristmill.objectives.protocol import StepInfo
from gristmill.objectives.selection import (
    Recorded,
    Selection,
    selective_cross_entropy,
    selective_cross_entropy_reference,
)
from gristmill.pipeline import philox
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@settings(max_examples=60)
@given(
    views=st.integers(1, 4),
    images=st.integers(1, 5),
    count=st.integers(1, 40),
    levels=st.integers(1, 3),
    own_masks=st.booleans(),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from(["zero", "remove"]),
    without=st.sampled_from([None, "shared", "each"]),
    block=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 99),
)
def test_streamed_is_plain(
    views: int, images: int, count: int, levels: int, own_masks: bool, share: float, masked: Any, without: str | None,
    block: int, seed: int,
) -> None:  # fmt: skip
    """Values and gradients, also where every negative of a block, or of all, is dropped."""
    generator = torch.Generator().manual_seed(seed)
    queries, positive, rows = unit(generator, views, images, 6), unit(generator, images, 6), unit(generator, count, 6)
    stay = torch.rand(levels, views if own_masks else 1, images, count, generator=generator) < share
    removed = None
    if without:
        removed = torch.rand(images if without == "each" else 1, count, generator=generator) < 0.4
    cotangent = torch.randn(levels, views, images, generator=generator, dtype=torch.float64)
    how: dict[str, Any] = {"levels": levels, "keep": Recorded(stay), "removed": removed, "masked": masked}
    one, two = queries.clone().requires_grad_(), queries.clone().requires_grad_()
    fast = selective_cross_entropy(one, positive, rows, 5.0, block=block, **how)
    plain = selective_cross_entropy_reference(two, positive, rows, 5.0, **how)
    torch.testing.assert_close(fast.loss, plain, rtol=1e-10, atol=1e-10)
    (fast.loss * cotangent).sum().backward()
    (plain * cotangent).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-10)


def test_gradient_of_the_plain_form() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, positive, rows = unit(generator, 2, 3, 4).requires_grad_(), unit(generator, 3, 4), unit(generator, 9, 4)
    keep = Recorded(torch.rand(2, 1, 3, 9, generator=generator) < 0.5)
    assert torch.autograd.gradcheck(
        lambda q: selective_cross_entropy(q, positive, rows, 2.0, levels=2, keep=keep).loss, queries
    )


def test_nothing_dropped_is_info_nce_and_won_tells_the_winner() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, positive, rows = unit(generator, 1, 50, 4), unit(generator, 50, 4), unit(generator, 5, 4)
    found = selective_cross_entropy(queries, positive, rows, 5.0)
    logits = torch.cat([(queries[0] * positive).sum(1, keepdim=True), queries[0] @ rows.T], dim=1) * 5
    torch.testing.assert_close(found.loss[0, 0], F.cross_entropy(logits, torch.zeros(50).long(), reduction="none"))
    assert torch.equal(found.won[0, 0], logits.argmax(1) == 0)
    assert 0 < found.won.float().mean() < 1


@settings(max_examples=40)
@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(1, 21),
)
def test_numbers_are_those_of_the_pipelines_philox(
    key: int, positions: list[int], streams: list[int], first: int, count: int
) -> None:
    start, stop = 4 * first, 4 * first + count
    ours = uniform_block(key, torch.tensor(positions), streams, start, stop)
    theirs = philox.words(key, np.array(positions)[None], np.array(streams)[:, None], stop)[..., start:]
    assert ours.dtype == torch.float32
    assert np.array_equal(ours.numpy(), (theirs >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24))


def selection(images: int, count: int, seed: int = 0) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    rows, prototypes = unit(generator, count, 6).float(), [unit(generator, k, 6).float() * 5 for k in (9, 4)]
    own = [torch.randint(len(p), (images,), generator=generator) for p in prototypes]
    lse = [streamed_logsumexp(rows, p, 1.0)[0] for p in prototypes]
    marks = [p[o] for p, o in zip(prototypes, own, strict=True)]
    draws = keyed(seed, "test"), torch.arange(images) + 1000, [[0, 1], [256, 257]]
    return Selection([rows, rows], marks, lse, (0.0, 0.999), draws)


def test_blocks_cut_nothing_and_dropped_is_counted() -> None:
    whole, parts = selection(7, 90), selection(7, 90)
    stay = whole(slice(0, 90))
    assert stay.shape == (2, 2, 7, 90)
    assert torch.equal(stay, torch.cat([parts(slice(s, min(s + 16, 90))) for s in range(0, 90, 16)], dim=-1))
    assert int(whole.dropped) == int(parts.dropped) == int((~stay).sum())
    assert not torch.equal(stay[:, 0], stay[:, 1])  # each view's own draws


def test_an_image_keeps_its_masks_on_any_rank() -> None:
    whole, stay = selection(8, 60), selection(8, 60)(slice(0, 60))
    for rank in range(2):
        mine = slice(rank * 4, rank * 4 + 4)
        key, positions, streams = whole.draws
        half = Selection(
            whole.rows, [m[mine] for m in whole.marks], whole.lse, whole.bounds, (key, positions[mine], streams)
        )
        assert torch.equal(half(slice(0, 60)), stay[:, :, mine])


def test_rows_are_dropped_as_often_as_their_probability_says() -> None:
    draws = keyed(1, "often"), torch.arange(400), [[0, 1]]
    few = selection(1, 20)
    many = Selection(few.rows, [m.expand(400, -1) for m in few.marks], few.lse, (0.0, 0.999), draws)
    stay = many(slice(0, 20))[:, 0].float().mean(1)
    for level in range(2):
        wanted = few.probability(level, slice(0, 20))[0]
        assert (stay[level] - wanted).abs().max() < 0.12
        assert (stay[level] - wanted).abs().mean() < 0.03


def test_mean_drop_is_one_in_k() -> None:
    """Section 3, HCSC 2: memberships of a row add up to one, so uniform labels drop a share of 1 / k before the clamp."""
    generator = torch.Generator().manual_seed(0)
    rows, prototypes = unit(generator, 64, 6), unit(generator, 12, 6) * 5
    lse = streamed_logsumexp(rows, prototypes, 1.0)[0]
    every = Selection([rows], [prototypes], [lse], (0.0, 1.0), (0, torch.arange(12), [[0]]))
    assert float(1 - every.probability(0, slice(0, 64)).mean()) == pytest.approx(1 / 12)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


def test_no_whole_product_is_ever_held() -> None:
    """Neither [queue, prototypes] (4 million here) nor [queue, prototypes above], in clustering, loss or commit."""
    config = HierarchyConfig(
        queue=4096,
        levels=(1024, 500, 100),
        assign="stream",
        memory=4096,
        warmup=0.0,
        ramp=0.0,
        iterations=1,
        attempts=1,
    )
    objective = HierarchyObjective(config, 16, seed=0)
    generator = torch.Generator().manual_seed(0)
    info = StepInfo(batch=8, student_crops=5, student_globals=1, teacher_crops=1, progress=0.5)
    assert objective.memory is not None
    objective.memory.enqueue(unit(generator, 4096, 16).float())
    with Largest() as largest:
        objective.refit(info)
        queries, keys = unit(generator, 40, 16).float().requires_grad_(), unit(generator, 8, 16).float()
        outcome = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info)
        outcome.loss.backward()
        objective.commit(outcome)
    assert objective.last == 0
    assert 4096 * 16 <= largest.numbers <= 1024 * 1024  # a block of rows and all prototypes of a clustering
