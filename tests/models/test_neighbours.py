"""The neighbour search and block: the official indices and rows exactly, timm's block to rounding."""

from pathlib import Path

import gristmill.models.neighbours as neighbours
import pytest
import torch
from gristmill.models.neighbours import NeighbourBlock, search
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch.nn.functional import normalize

VECTORS = Path(__file__).parent.parent / "vectors"


def test_search_equals_the_official_one():
    official = torch.load(VECTORS / "mugs_memory.pt", weights_only=True)
    state = official["init"]
    for step in official["steps"]:
        # The official memory keeps the rows thrice. They differ until they are written: it searches one, returns another.
        unit_bank = normalize(state["block.queue_q"], dim=-1)
        index, rows = search(step["query"], state["block.queue_k"], official["top_n"], unit_bank)
        assert torch.equal(index, step["index"])
        assert torch.equal(rows, step["keys"])
        assert torch.equal(search(step["query"], state["block.queue_q"], official["top_n"])[0], step["index"])
        state = step["state_after"]


@given(st.integers(1, 40), st.integers(1, 50), st.data())
@settings(deadline=None)
def test_search_finds_the_nearest(queries: int, rows: int, data):
    k = data.draw(st.integers(1, rows))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    query, bank = torch.randn(queries, 6, generator=generator), torch.randn(rows, 6, generator=generator) * 5
    index, found = search(query, bank, k)
    cosine = torch.nn.functional.cosine_similarity(query[:, None].double(), bank[None].double(), dim=-1)
    torch.testing.assert_close(
        cosine.gather(1, index), cosine.sort(dim=1, descending=True).values[:, :k], atol=1e-6, rtol=0
    )
    assert torch.equal(found, bank[index])
    assert all(len(set(row)) == k for row in index.tolist())


def test_search_in_parts_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    query, bank = torch.randn(33, 8, generator=generator), torch.randn(64, 8, generator=generator)
    whole, _ = search(query, bank, 5)
    monkeypatch.setattr(neighbours, "_SEARCH_CELLS", 64 * 4)
    assert torch.equal(search(query, bank, 5)[0], whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(search(query, bank, 5)[0], whole)


def test_search_in_too_small_a_memory_is_refused():
    with pytest.raises(ValueError, match="8 neighbours asked of a memory of 4 rows"):
        search(torch.zeros(1, 3), torch.zeros(4, 3), 8)


def test_search_has_no_gradient():
    query, bank = torch.ones(3, 4, requires_grad=True), torch.eye(9, 4)
    assert not search(query, bank, 2)[1].requires_grad


def test_block_equals_the_whole_vit_block():
    torch.manual_seed(0)
    block = NeighbourBlock(24, 3).double()
    plain = Block(24, 3, qkv_bias=True).double()
    plain.load_state_dict(block.state_dict(), strict=True)
    norm = torch.nn.LayerNorm(24).double()
    rows = torch.randn(5, 8, 24, dtype=torch.float64)
    queries = [torch.randn(5, 24, dtype=torch.float64).requires_grad_()]
    queries.append(queries[0].detach().clone().requires_grad_())
    found = block(queries[0], rows, norm)
    wanted = norm(plain(torch.cat([queries[1][:, None], rows], dim=1)))[:, 0]
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    wanted.backward(cotangent)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(queries[0].grad, queries[1].grad, rtol=0, atol=1e-12)
    for (key, parameter), other in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-12, msg=key)
