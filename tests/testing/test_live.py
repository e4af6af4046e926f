"""LiveStorages against sums that can be done by hand."""

import gc

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.testing.live import LiveStorages  # noqa: E402

KIB = 1024


def _kib() -> "torch.Tensor":
    return torch.empty(256, dtype=torch.float32)


def test_views_and_in_place_results_add_nothing() -> None:
    with LiveStorages() as live:
        a = _kib()
        views = (a.view(16, 16), a[3:], a.detach(), a.add_(1))
        assert live.live_bytes() == KIB
        b = a + 1
        assert live.live_bytes() == 2 * KIB
        del a, views
        assert live.live_bytes() == KIB
        del b
        assert live.live_bytes() == 0
    assert live.peak_bytes == 2 * KIB


def test_storage_lives_as_long_as_a_view_of_it() -> None:
    with LiveStorages() as live:
        tail = (_kib() * 2)[-1:]
        gc.collect()
        assert live.live_bytes() == KIB
        assert [(s.operator, s.shape) for s in live.storages()] == [("aten::mul", (256,))]
        del tail
    assert live.live_bytes() == 0


def test_what_existed_before_is_not_counted_even_through_views() -> None:
    weight = torch.ones(256)
    with LiveStorages() as live:
        view = weight.view(16, 16).t()
        assert live.live_bytes() == 0
        ignored = _kib()
        live.ignore([ignored])
        again = ignored.view(2, -1)
        assert live.live_bytes() == 0
        del view, again


def test_python_data_counts() -> None:
    with LiveStorages() as live:
        made = torch.tensor([1.0, 2.0])
        assert live.live_bytes() == made.untyped_storage().nbytes()


def test_resize_is_followed_both_ways() -> None:
    resize = vars(torch.UntypedStorage).get("resize_")
    with LiveStorages() as live:
        a = _kib()
        a.untyped_storage().resize_(0)
        assert live.live_bytes() == 0
        a.untyped_storage().resize_(4 * KIB)
        assert live.live_bytes() == 4 * KIB == live.peak_bytes
    assert vars(torch.UntypedStorage).get("resize_") is resize


def test_forward_keeps_what_autograd_saves_and_backward_frees_it() -> None:
    x = torch.ones(256, requires_grad=True)
    with LiveStorages() as live:
        y = x.exp().sin()  # exp saves its output, sin its input: the same storage
        assert live.live_bytes() == 2 * KIB
        loss = y.sum()
        del y  # nobody saved it
        assert live.live_bytes() == KIB + loss.untyped_storage().nbytes()
        live.reset_peak()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        gc.collect()
        assert x.grad is not None
        assert live.live_bytes() == KIB, live.storages()  # the gradient
    assert live.peak_bytes >= 2 * KIB


def test_a_storage_at_a_reused_address_is_a_new_one() -> None:
    with LiveStorages() as live:
        for _ in range(50):
            a = _kib()
            assert live.live_bytes() == KIB
            del a
            assert live.live_bytes() == 0
