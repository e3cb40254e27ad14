"""Code that goes another way on a CPU goes a GPU's where it is asked to, in this thread, and in no other."""

import threading

import pytest
import torch
from gristmill.models.host import off_host, on_host
from gristmill.models.prototypes import rows_in_block


def test_the_way_of_a_device():
    assert on_host("cpu")
    assert not on_host("cuda")
    seen: list[bool] = []
    with off_host():
        assert not on_host("cpu")
        other = threading.Thread(target=lambda: seen.append(on_host("cpu")))
        other.start()
        other.join()
    assert seen == [True]
    assert on_host("cpu")


def test_it_is_given_back_after_an_error():
    @off_host()
    def failing() -> None:
        assert not on_host("cpu")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert on_host("cpu")


@pytest.mark.parametrize("count", [1, 7, 48, 100, 768, 10**6])
def test_blocks_are_of_round_sizes(count: int):
    """Products with a side that is no multiple of 64 take up to 40 % longer."""
    rows = rows_in_block(count, "cpu")
    assert rows % 64 == 0
    assert rows == 64 or (1 << 19) - 64 * count < rows * count <= 1 << 19


def test_a_gpus_way_has_larger_blocks_and_the_backward_goes_it_too():
    small = rows_in_block(100, "cpu")
    found: list[int] = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[override]
            return 2 * x

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            found.append(rows_in_block(100, "cpu"))
            return 2 * grad

    x = torch.ones(1, requires_grad=True)
    with off_host():
        Asking.apply(x).sum().backward()  # type: ignore[union-attr]
    assert found == [rows_in_block(100, "cuda")]
    assert found[0] > small
