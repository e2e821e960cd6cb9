"""The product of float32 matrices in tiles of bfloat16, against float64 and PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from i3lm.ops import linear
from i3lm.ops.dispatch import use_implementation
from i3lm.ops.linear import LINEAR
from tests.ops.drawing import lay, make_generator

# They look inside a kernel that only some processors can run; what holds for every implementation
# of `linear` is tested in test_linear.py without a mark.
pytestmark = pytest.mark.skipif(
    LINEAR.named("amx").refuses(torch.device("cpu"), torch.float32) is not None,
    reason="this processor has no AMX",
)
U = 2.0**-24  # what rounding to float32 changes at most, of a number


def _multiply(*inputs: torch.Tensor | None) -> torch.Tensor:
    from i3lm.ops.linear.amx_float32 import multiply_float32

    return multiply_float32(*inputs)[0]


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=make_generator(*shape))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_is_as_exact_as_a_sum_in_float32(data: st.DataObject):
    from i3lm.ops.linear import amx_float32

    x_by_rows, y_by_rows = data.draw(st.booleans()), data.draw(st.booleans())
    some, whole = st.integers(1, 300), st.integers(1, 9).map(lambda n: 32 * n)
    M = data.draw(some if x_by_rows else whole)
    K = data.draw(whole if x_by_rows or not y_by_rows else some)
    N, has_bias, tasks = data.draw(whole), data.draw(st.booleans()), data.draw(st.integers(1, 6))
    # So few at a time that it takes several pieces of each.
    deep = data.draw(st.sampled_from([32, 96, 1024]))
    of_second, of_first = (data.draw(st.sampled_from([2**10, 2**13, 2**22])) for _ in range(2))
    generator = make_generator(M, K, N)
    margins = [data.draw(st.sampled_from([0, 1, 32])) for _ in range(2)]
    x, y = (
        torch.randn(shape, generator=generator)
        * 2.0 ** torch.randint(-20, 20, shape, generator=generator)
        for shape in ((M, K), (K, N))
    )
    bias = torch.randn(N, generator=generator) if has_bias else None
    x, y = lay(x, x_by_rows, margins[0]), lay(y, y_by_rows, margins[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx_float32, "match_threads", lambda: tasks)
        patch.setattr(amx_float32, "_DEEP", deep)
        patch.setattr(amx_float32, "_MANY", of_second)
        patch.setattr(amx_float32, "_MANY_OF_FIRST", of_first)
        got, sums = amx_float32.multiply_float32(x, y, bias, wants_sums=not x_by_rows)
        patch.setattr(amx_float32, "match_threads", lambda: 1)
        of_one = amx_float32.multiply_float32(x, y, bias, wants_sums=not x_by_rows)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    terms = x.double().abs() @ y.double().abs() + (0 if bias is None else bias.double().abs())
    exact = x.double() @ y.double() + (0 if bias is None else bias.double())
    # The bound of a float32 sum of K products and a bias, one after the other (Higham, Accuracy and
    # Stability of Numerical Algorithms, section 3.1), of six products in place of one, and of the
    # parts that are left out.
    assert ((got.double() - exact).abs() <= (K + 8) * U * terms).all()
    # The same bits for any number of threads.
    assert torch.equal(of_one[0], got)
    assert (sums is None) == x_by_rows
    if sums is not None:
        wrong = (sums.double() - x.double().sum(1)).abs()
        # Of 32 numbers in pairs, of all these sums in float64, rounded once.
        assert (wrong <= 7 * U * x.double().abs().sum(1)).all()
        assert torch.equal(of_one[1], sums)


@pytest.mark.parametrize("form", [(True, False), (True, True), (False, True), (False, False)])
def test_it_errs_no_more_than_the_library(form: tuple[bool, bool]):
    x, y = lay(_numbers(512, 768), form[0], 0), lay(_numbers(768, 256), form[1], 0)
    exact = x.double() @ y.double()

    def error(product: torch.Tensor) -> float:
        return (product.double() - exact).square().mean().sqrt().item()

    # In the mean it was 0.4 to 1.05 of MKL's error, for sums of 64 to 2,048 products.
    assert error(_multiply(x, y)) < 1.5 * error(x @ y)


def test_each_single_product_is_right_to_the_last_bits():
    # One product of each sum, with numbers of all sizes and 24 bits each.
    generator = make_generator(1)
    sizes = 2.0 ** torch.randint(-50, 50, (128,), generator=generator)
    x = torch.diag((torch.rand(128, generator=generator) + 1) * sizes)
    y = (torch.rand(128, 160, generator=generator) + 1) * sizes.unsqueeze(1)
    exact = x.double() @ y.double()
    # The part left out, 2 ** -24 at most, and roundings of the six that are added.
    assert ((_multiply(x, y).double() - exact).abs() <= 4 * U * exact.abs()).all()
    # Nothing is lost where all bits are in the first two parts of each.
    whole = torch.randint(1, 2**12, (128, 96), generator=generator).float()
    diagonal = torch.diag(torch.randint(1, 2**12, (128,), generator=generator).float())
    assert torch.equal(_multiply(diagonal, whole), diagonal @ whole)


def test_very_small_and_very_large_numbers():
    def product(left: float, right: float) -> torch.Tensor:
        return _multiply(torch.full((40, 64), left), torch.full((64, 32), right))

    odd = 1 + 2.0**-23  # all 24 bits count
    assert (product(odd * 2.0**-78, 2.0**-24) == odd * 2.0**-96).all()  # 2**-102, 64 times
    assert (product(odd * 2.0**-90, 2.0**-24) == 2.0**-108).all()
    assert (product(odd * 2.0**-103, 2.0**20) == odd * 2.0**-77).all()
    assert (product(odd * 2.0**-104, 2.0**20) == 2.0**-78).all()
    assert (product(2.0**-70, 2.0**-59) == 0).all()  # each product is below 2**-126
    assert (product(odd * 2.0**110, 2.0**1) == odd * 2.0**117).all()
    assert (product(2.0**70, -(2.0**60)) == -torch.inf).all()
    assert product(torch.inf, 1).isnan().all()


def test_a_nan_reaches_its_own_row_and_column_alone():
    # The last rows of a block, and of a sum, which are filled up.
    x, y = torch.ones(45, 64), torch.ones(64, 96)
    x[44, 63] = torch.nan
    rows = _multiply(x, y).isnan()
    assert rows[44].all()
    assert not rows[:44].any()
    turned = torch.ones(45, 64).T, torch.ones(45, 96)
    turned[1][44, 95] = torch.nan
    product = _multiply(*turned)
    assert product[:, 95].isnan().all()
    assert product[:, :95].isfinite().all()


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that will have the sizes of products that the kernel serves."""
    from i3lm.ops.linear import amx_float32

    served: list[tuple[int, ...]] = []
    kernel = amx_float32.multiply_float32

    def watched(x, y, *rest):
        served.append((*x.shape, y.shape[1]))
        return kernel(x, y, *rest)

    monkeypatch.setattr(amx_float32, "multiply_float32", watched)
    return served


@pytest.mark.parametrize("wanted", ["111", "011", "101", "110", "001", "100"])
@pytest.mark.parametrize("lies", ["plain", "turned", "expanded"])
def test_it_serves_the_products_of_training(
    wanted: str, lies: str, monkeypatch: pytest.MonkeyPatch
):
    served = _watched(monkeypatch)
    exact = [_numbers(*s).double() for s in ((2, 512, 256), (640, 256), (640,))]
    weights = _numbers(2, 512, 640).double()
    if lies == "turned":
        exact[0], exact[1] = _numbers(512, 2, 256).double().transpose(0, 1), exact[1].T.clone().T
    elif lies == "expanded":
        weights = weights[:1, :1, :1].expand(weights.shape)
    inputs = [x.float().requires_grad_(w == "1") for x, w in zip(exact, wanted, strict=True)]
    exact = [x.requires_grad_(w == "1") for x, w in zip(exact, wanted, strict=True)]
    with use_implementation(linear="amx"):
        got, expected = linear(*inputs), F.linear(*exact)
        assert served == [(1024, 256, 640)]
        if lies == "expanded":
            (got.sum() * weights[0, 0, 0].item()).backward()
        else:
            got.backward(weights.float())
        expected.backward(weights)
    if lies == "plain":
        of_x, of_weight = (1024, 640, 256), (640, 1024, 256)
        parts = [of_x] * int(wanted[0]) + [of_weight] * int(wanted[1])
        assert served[1:] == parts
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(inputs, exact, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert a.grad.shape == a.shape
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=2e-4)


def test_what_it_leaves_to_the_library(monkeypatch: pytest.MonkeyPatch):
    served = _watched(monkeypatch)
    with use_implementation(linear="amx"):
        for shape, width in (((64, 256), 512), ((4096, 257), 256), ((4096, 256), 250)):
            x, weight = _numbers(*shape), _numbers(width, shape[1])
            torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert not served
    # A product that it serves, both of whose gradients are too narrow for it.
    x, weight = _numbers(1024, 64).requires_grad_(), _numbers(2048, 64).requires_grad_()
    with use_implementation(linear="amx"):
        linear(x, weight).sum().backward()
    assert served == [(1024, 64, 2048)]
    expected = weight.detach().sum(0).expand(1024, 64), x.detach().sum(0).expand(2048, 64)
    torch.testing.assert_close((x.grad, weight.grad), expected, rtol=1e-4, atol=1e-4)


def test_who_asks_for_less_exact_products_gets_those_of_pytorch():
    where, amx = (torch.device("cpu"), torch.float32), LINEAR.named("amx")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "less exact" in amx.refuses(*where)
    finally:
        torch.set_float32_matmul_precision(before)
    assert amx.refuses(*where) is None


def test_it_refuses_what_it_would_misread():
    from i3lm.ops.linear.amx_float32 import refuses

    x, y = _numbers(1024, 512), _numbers(512, 512)
    assert refuses(x, y) is None
    for wrong, reason in (
        ((x.bfloat16(), y, None), "float32"),
        ((x, y.double(), None), "float32"),
        ((x, y, torch.ones(512).double()), "float32"),
        ((x, y[:480], None), "(480, 512)"),
        ((x, y[0], None), "(512,)"),
        ((x[:, ::2], y[:256], None), "one piece"),
        ((x[:, :1].expand(1024, 512), y, None), "one piece"),
        ((x, y, torch.ones(1)), "(1,)"),
        ((x, y, torch.ones(512, device="meta")), "CPU"),
        ((x, y.to("meta"), None), "CPU"),
        ((x[:100], y, None), "large"),
    ):
        assert reason in refuses(*wrong)
    assert "by columns" in refuses(x, y, None, wants_sums=True)
