from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from i3lm.ops import linear
from i3lm.ops.dispatch import processor_vendor, use_implementation
from i3lm.ops.linear import FEW_ROWS, LINEAR, NARROW_PRODUCT, has_tiles, multiply
from i3lm.ops.linear.numba import few_rows
from i3lm.ops.linear.numba_transpose import narrow_and_transpose, transpose
from tests.ops.drawing import lay, make_generator

NAMES = [
    i.name for i in LINEAR.implementations if i.refuses(torch.device("cpu"), torch.float32) is None
]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_product_and_gradients_in_float32(name: str, data: st.DataObject):
    before = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=2))
    inner, outer = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    has_bias = data.draw(st.booleans())
    generator = make_generator(inner, outer, has_bias, *before)
    shapes = [(*before, inner), (outer, inner), *([(outer,)] if has_bias else [])]
    exact = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    with use_implementation(linear=name):
        got = linear(*inputs)
    expected = F.linear(*exact)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((got * weights.float()).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    assert got.dtype == torch.float32
    # Sums of up to 40 (125 for the weight) products of size 1 in float32.
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# Few products of numbers, and as many as the kernel for AMX serves itself.
@pytest.mark.parametrize("size", [24, 512])
@pytest.mark.parametrize("name", NAMES)
def test_a_product_changed_in_place_differentiated_twice_and_by_functions(name: str, size: int):
    generator = make_generator(size)
    x, weight = (torch.randn(size, size, generator=generator) for _ in range(2))
    x.requires_grad_()
    with use_implementation(linear=name):
        output = linear(x, weight)
        output.add_(1)
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        by_function = torch.func.grad(lambda x: linear(x, weight).square().sum())(x.detach())
    exact, matrix = x.detach().double(), weight.double()
    # Of the sum of (x W^T)^2: 2 x W^T W, and 2 W^T W summed over one side.
    square = 2 * matrix.T @ matrix
    torch.testing.assert_close(by_function.double(), exact @ square, rtol=1e-4, atol=1e-2)
    expected = square.sum(0).expand(size, size)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-2)


def test_intel_has_the_better_library_for_its_own(monkeypatch: pytest.MonkeyPatch):
    onednn = LINEAR.named("onednn")
    where = torch.device("cpu"), torch.float32
    module = sys.modules["i3lm.ops.linear"]  # the function has the same name
    monkeypatch.setattr(module, "processor_vendor", lambda: "GenuineIntel")
    assert onednn.refuses(*where) is not None
    monkeypatch.setattr(module, "processor_vendor", lambda: "AuthenticAMD")
    can = "AVX512" in torch.backends.cpu.get_cpu_capability()
    assert (onednn.refuses(*where) is None) == can


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux says")
def test_the_processor_says_who_made_it():
    assert processor_vendor() in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def test_strides_of_inputs_do_not_matter():
    generator = make_generator(1)
    x = torch.randn(7, 5, 3, generator=generator).transpose(0, 2)  # (3, 5, 7)
    weight = torch.randn(7, 4, generator=generator).T
    torch.testing.assert_close(linear(x, weight), x.contiguous() @ weight.contiguous().T)


def test_frozen_inputs_have_no_gradient():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))


def test_autocast_and_low_precision_keep_their_dtype():
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64


NARROW = [
    i.name
    for i in NARROW_PRODUCT.implementations
    if i.refuses(torch.device("cpu"), torch.bfloat16) is None
]
# These look inside a kernel that only some processors can run; what holds for every implementation
# is tested without a mark, for those that there are.
needs_amx = pytest.mark.skipif("amx" not in NARROW, reason="this processor has no AMX")


@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 3), (1, 70, 40, 33), (4, 200, 1024, 512), (3, 50, 96, 160)]
)
# oneDNN need not multiply bfloat16 on other processors, as it does to add a bias at the end.
@pytest.mark.parametrize(
    ("has_tiles", "has_bias"),
    [(False, False), (False, True), (True, False), *([(True, True)] if has_tiles() else [])],
)
@pytest.mark.parametrize("name", NARROW)
def test_products_under_autocast(
    shape: tuple[int, ...],
    has_tiles: bool,
    has_bias: bool,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys.modules["i3lm.ops.linear"], "has_tiles", lambda: has_tiles)
    *before, inner, outer = shape
    generator = make_generator(*shape, has_bias)
    shapes = [(*before, inner), (outer, inner), *([(outer,)] if has_bias else [])]
    # Numbers of bfloat16, so that their products alone are rounded.
    exact = [torch.randn(s, generator=generator).bfloat16().double() for s in shapes]
    inputs = [x.float().requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    expected = F.linear(*exact)
    weights = torch.randn(expected.shape, generator=generator).bfloat16()
    with use_implementation(narrow_product=name):
        with torch.autocast("cpu", torch.bfloat16):
            got = linear(*inputs)
        grads = torch.autograd.grad(got, inputs, weights)
    wanted = torch.autograd.grad(expected, exact, weights.double())
    assert got.dtype == torch.bfloat16
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        assert a.shape == b.shape
        # Rounded to bfloat16 at most twice: 2^-8 of the largest numbers.
        torch.testing.assert_close(
            a.double(), b, rtol=2**-7, atol=2**-8 * b.detach().abs().max().item()
        )


@needs_amx
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_amx_rounds_a_product_once(data: st.DataObject):
    from i3lm.ops.linear import amx

    x_by_rows, y_by_rows = data.draw(st.booleans()), data.draw(st.booleans())
    some, whole = st.integers(1, 300), st.integers(1, 9).map(lambda n: 32 * n)
    M = data.draw(some if x_by_rows else whole)
    K = data.draw(whole if x_by_rows or not y_by_rows else some)
    N, wide = data.draw(whole), data.draw(st.booleans())
    has_bias, tasks = data.draw(st.booleans()), data.draw(st.integers(1, 6))
    packed = data.draw(st.sampled_from([2**12, 2**14, 2**19]))  # so that it takes several pieces
    generator = make_generator(M, K, N)
    margins = [data.draw(st.sampled_from([0, 1, 32])) for _ in range(2)]
    x = lay(torch.randn(M, K, generator=generator).bfloat16(), x_by_rows, margins[0])
    y = torch.randn(K, N, generator=generator)
    y = lay(y if wide else y.bfloat16(), y_by_rows, margins[1])
    bias = torch.randn(N, generator=generator) if has_bias else None
    assert amx.refuses(x, y, bias, not x_by_rows) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "match_threads", lambda: tasks)
        patch.setattr(amx, "_MANY", packed)
        got, sums = amx.multiply(x, y, bias, wants_sums=not x_by_rows)
        patch.undo()
        patch.setattr(amx, "match_threads", lambda: 1)
        of_one = amx.multiply(x, y, bias, wants_sums=not x_by_rows)
    assert got.is_contiguous()
    narrow = y.bfloat16().double()
    expected = x.double() @ narrow + (0 if bias is None else bias.double())
    # Half a last bit of bfloat16, and what the order of a sum in float32 may change.
    terms = x.double().abs() @ narrow.abs() + 1
    assert ((got.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * terms).all()
    # The same bits for any number of threads.
    assert torch.equal(of_one[0], got)
    if sums is not None:
        torch.testing.assert_close(sums.double(), x.double().sum(1), rtol=1e-5, atol=1e-3)
        assert torch.equal(of_one[1], sums)


@needs_amx
def test_a_nan_reaches_its_own_row_and_column_alone():
    from i3lm.ops.linear import amx

    # The last rows of a block, and of a sum, which are filled up.
    x, y = torch.ones(45, 64).bfloat16(), torch.ones(64, 96)
    x[44, 63] = torch.nan
    rows = amx.multiply(x, y, None, wants_sums=False)[0].isnan()
    assert rows[44].all()
    assert not rows[:44].any()
    turned = torch.ones(45, 64).bfloat16().T, torch.ones(45, 96).bfloat16()
    turned[0][63, 44] = torch.nan
    product, sums = amx.multiply(*turned, None, wants_sums=True)
    assert product.isnan()[63].all()
    assert not product[:63].isnan().any()
    assert sums.isnan().nonzero().tolist() == [[63]]
    turned[0][63, 44], turned[1][44, 95] = 1, torch.inf
    product, _ = amx.multiply(*turned, None, wants_sums=False)
    assert product[:, 95].isinf().all()
    assert product[:, :95].isfinite().all()


def _numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=make_generator(*shape)).to(dtype)


@needs_amx
@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (_numbers(4, 64)[:, ::2], _numbers(32, 32), "one piece"),
        (_numbers(1, 1).expand(4, 32), _numbers(32, 32), "one piece"),
        (_numbers(4, 33), _numbers(33, 32), "multiples of 32"),
        (_numbers(4, 32), _numbers(32, 33), "multiples of 32"),
        (_numbers(32, 33).T, _numbers(32, 32), "multiples of 32"),
        (_numbers(0, 32), _numbers(32, 32), "multiples of 32"),
        (_numbers(4, 32), _numbers(32, 32), "sums"),
        (_numbers(4128, 32), _numbers(32, 32), "up to 4096"),
        (_numbers(4128, 32).T, _numbers(4128, 32), "up to 4096"),
    ],
)
def test_what_amx_refuses_goes_to_the_library(x: torch.Tensor, y: torch.Tensor, reason: str):
    from i3lm.ops.linear import amx

    wants_sums = reason == "sums" or x.stride(1) != 1
    assert reason in amx.refuses(x, y, None, wants_sums)
    product, sums = multiply(x, y, wants_sums=True)
    for got, exact in ((product, x.double() @ y.double()), (sums, x.double().sum(1))):
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=1e-4)


@needs_amx
def test_amx_refuses_what_it_would_misread():
    from i3lm.ops.linear import amx

    x, y = _numbers(4, 32), _numbers(32, 64, dtype=torch.float32)
    for wrong, reason in (
        ((x.float(), y, None), "float32"),
        ((x, y.double(), None), "float64"),
        ((x, y[:31], None), "(31, 64)"),
        ((x, y[0], None), "(64,)"),
        ((x, y, torch.ones(1)), "(1,)"),
        ((x, y, torch.ones(64, device="meta")), "CPU"),
        ((x, y.to("meta"), None), "CPU"),
    ):
        assert reason in amx.refuses(*wrong, False)
    with torch.autocast("cpu", torch.bfloat16):
        weight = torch.nn.Parameter(y.T)
        with pytest.raises(RuntimeError):
            linear(_numbers(4, 64), weight)
        # As PyTorch takes it.
        expected = F.linear(x, weight, torch.ones(1))
        assert torch.allclose(linear(x, weight, torch.ones(1)), expected, rtol=2**-6, atol=2**-6)


@needs_amx
@pytest.mark.parametrize("rows", [50, 800])
def test_amx_serves_the_products_of_training(rows: int, monkeypatch: pytest.MonkeyPatch):
    from i3lm.ops.linear import amx

    served = []

    def watched(x, y, *rest):
        served.append((tuple(x.shape), y.shape[1], y.dtype))
        return multiply_tiles(x, y, *rest)

    multiply_tiles = amx.multiply
    monkeypatch.setattr(amx, "multiply", watched)
    x, weight = _numbers(1, rows, 64).requires_grad_(), torch.nn.Parameter(torch.ones(96, 64))
    with torch.autocast("cpu", torch.bfloat16):
        linear(x, weight, torch.nn.Parameter(torch.ones(96))).sum().backward()
    of_weight = ((96, rows), 64, torch.bfloat16)
    assert served == [
        ((rows, 64), 96, torch.float32),
        ((rows, 96), 64, torch.float32),
        of_weight,
    ]


@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("sizes", [(4, 3), (32, 64)])
def test_a_gradient_may_stay_narrow(
    has_tiles: bool, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["i3lm.ops.linear"], "has_tiles", lambda: has_tiles)
    x, weight = torch.randn(6, sizes[0]), torch.nn.Parameter(torch.randn(*sizes[::-1]))
    kept = []
    for dtype in (torch.float32, None):
        weight.grad, weight.grad_dtype = None, dtype
        with torch.autocast("cpu", torch.bfloat16):
            linear(x, weight).sum().backward()
        kept.append(weight.grad)
    assert [grad.dtype for grad in kept] == [torch.float32, torch.bfloat16]
    assert torch.equal(kept[0], kept[1].float())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 140), columns=st.integers(0, 300), wants_sums=st.booleans())
def test_transpose_and_sums_of_any_shape(rows: int, columns: int, wants_sums: bool):
    x = torch.randn(rows, columns, generator=make_generator(rows, columns)).bfloat16()
    turned, sums = transpose(x, wants_sums)
    assert turned.is_contiguous()
    assert torch.equal(turned, x.T)
    if wants_sums:
        # Up to 140 numbers of size 1, added in float32.
        torch.testing.assert_close(sums, x.double().sum(0).float(), rtol=1e-5, atol=1e-4)
    else:
        assert sums is None


def test_transpose_of_a_transpose_and_of_nan():
    x = torch.randn(64, 96).bfloat16().T  # not contiguous
    x[3, 5] = float("nan")
    turned, sums = transpose(x, wants_sums=True)
    assert torch.equal(turned.view(torch.int16), x.T.contiguous().view(torch.int16))
    assert sums.isnan().nonzero().tolist() == [[5]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 140), columns=st.integers(0, 140))
def test_a_narrow_copy_and_its_transpose_of_any_shape(rows: int, columns: int):
    x = torch.randn(rows, columns, generator=make_generator(rows, columns))
    narrow, turned = narrow_and_transpose(x)
    assert torch.equal(narrow, x.bfloat16())
    assert turned.shape == (columns, rows)
    assert torch.equal(turned, narrow.T)


def test_is_exact_where_float32_is_promised():
    # A product in bfloat16 or TF32 would lose these digits.
    x = torch.tensor([[1.0, 2.0**-20]])
    assert linear(x, torch.ones(1, 2)).item() == 1 + 2.0**-20


@pytest.mark.parametrize("name", ["numba", "torch"])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 bfloat16", "float32 bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_few_rows_without_gradients(name: str, rows: int, dtypes: str, has_bias: bool):
    of_x, of_weight = (getattr(torch, dtype) for dtype in dtypes.split())
    generator = make_generator(rows, has_bias)
    x = torch.randn(1, rows, 70, generator=generator).to(of_x)
    weight = torch.randn(33, 70, generator=generator).to(of_weight)
    bias = torch.randn(33, generator=generator) if has_bias else None
    bias = bias if bias is None or of_x == torch.float32 else bias.to(of_x)
    with torch.no_grad(), use_implementation(linear_of_few_rows=name):
        got = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.dtype == of_x
    # Against sums of size 8 in float32, or rounded to bfloat16 where inputs or outputs are.
    exact = of_x == of_weight or (name == "numba" and rows <= FEW_ROWS)
    tolerance = 1e-5 if of_x == torch.float32 and exact else 2**-7
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * 8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, FEW_ROWS + 2),
    inputs=st.integers(0, 300),
    outputs=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
def test_a_few_rows_of_any_shape(rows: int, inputs: int, outputs: int, dtype: torch.dtype):
    generator = make_generator(rows, inputs, outputs)
    x = torch.randn(rows, inputs, generator=generator)
    scale, bias = torch.randn(2, outputs, generator=generator)
    weight = (torch.randn(outputs, inputs, generator=generator) * 9).to(dtype)
    expected = x.double() @ weight.double().T * scale.double() + bias.double()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(few_rows(x, weight, bias, scale))
    finally:
        torch.set_num_threads(threads)
    # Sums of up to 300 products of size 9 in float32.
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=4e-3)
    # A sum has one order, wherever a thread's share begins and whatever is computed beside it.
    assert torch.equal(*results)
    for r in range(rows):
        assert torch.equal(few_rows(x[r : r + 1], weight, bias, scale)[0], results[0][r])
    few = outputs // 3
    head = few_rows(x, weight[:few], bias[:few], scale[:few])
    assert torch.equal(head, results[0][:, :few])


def test_a_few_rows_of_float64_keep_their_digits():
    generator = make_generator(5)
    x, weight = (torch.randn(2, 9, generator=generator, dtype=torch.float64) for _ in "xw")
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("name", NAMES)
def test_expanded_inputs_and_gradients(name: str):
    torch.manual_seed(0)
    x = torch.randn(1, 40).expand(30, 40).requires_grad_()
    weight = torch.randn(50, 40, requires_grad=True)
    with use_implementation(linear=name):
        grads = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    expected = weight.detach().sum(0).expand(30, 40), x.detach().sum(0).expand(50, 40)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)
