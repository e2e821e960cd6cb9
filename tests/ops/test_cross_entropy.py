from __future__ import annotations

import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from i3lm.ops import linear, linear_cross_entropy
from i3lm.ops.cross_entropy import SOFTMAX_LOSS, _logits
from i3lm.ops.dispatch import Implementation, use_implementation
from i3lm.ops.linear.numba_transpose import narrow_and_transpose
from tests.ops.drawing import make_generator

NAMES = SOFTMAX_LOSS.names


@pytest.fixture(autouse=True, scope="module")
def small_vocabularies_are_several_pieces():
    """Where logits are computed twice, in pieces of two tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SMALL_PIECE", 1), ("FEWEST_COLUMNS", 2)):
            patch.setattr(sys.modules["i3lm.ops.cross_entropy"], name, value)
        yield


# Against float64: sums over up to 200 columns, and in bfloat16 logits of 8 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draw(N: int, C: int, V: int, has_bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = make_generator(N, C, V, has_bias)
    shapes = [(N, C), (V, C), *([(V,)] if has_bias else [])]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.2] = -100
    return tensors, labels


def loss_of(tensors: list[Tensor], labels: Tensor, **options) -> Tensor:
    hidden, weight, *bias = tensors
    return linear_cross_entropy(hidden, weight, bias[0] if bias else None, labels, **options)


def plain_loss(tensors: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(*tensors), labels)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 40),
    C=st.integers(1, 9),
    V=st.integers(1, 200),
    has_bias=st.booleans(),
    pieces=st.sampled_from([*({"piece_bytes": n} for n in (1, 500, 2**26)), {"recompute": True}]),
)
def test_equals_the_plain_loss_in_pieces_of_any_size(
    name: str, dtype: torch.dtype, N: int, C: int, V: int, has_bias: bool, pieces: dict[str, int]
):
    tensors, labels = draw(N, C, V, has_bias)
    labels[0] = 0  # at least one counts
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with use_implementation(softmax_loss=name):
        got = loss_of(leaves, labels, **pieces)
    expected = plain_loss(exact, labels)
    grads = torch.autograd.grad(3 * got, leaves)
    wanted = torch.autograd.grad(3 * expected, exact)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
        assert error <= TOLERANCES[dtype]


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        result = function(*arguments, **(settings or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [50, 1])
def test_logits_that_are_computed_twice_are_few(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.modules["i3lm.ops.cross_entropy"], "SMALL_PIECE", rows * 128)
    tensors, labels = draw(rows, 4, 1000, True)
    labels[0] = 999
    leaves = [x.float().requires_grad_() for x in tensors]
    with _Largest() as largest, use_implementation(softmax_loss=name):
        loss = loss_of(leaves, labels, recompute=True)
    assert largest.numbers <= max(rows * 128, leaves[1].numel())
    grads = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(loss_of(leaves, labels), leaves)
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_stay_finite_and_exact(name: str, recompute: bool):
    # Logits of -3e4 to 3e4: their exponentials exist only relative to the largest.
    hidden = torch.tensor([[1.0], [-1.0], [1e-3]], requires_grad=True)
    weight = torch.linspace(-3e4, 3e4, 101).unsqueeze(1).requires_grad_()
    labels = torch.tensor([100, 100, 40])
    with use_implementation(softmax_loss=name):
        got = linear_cross_entropy(hidden, weight, None, labels, recompute=recompute)
    expected = plain_loss([hidden.detach().double(), weight.detach().double()], labels)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(got, (hidden, weight))
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_diverged_row_shows(name: str, bad: float, dtype: torch.dtype):
    hidden, weight = torch.ones(3, 2, dtype=dtype), torch.ones(70, 2, dtype=dtype)
    hidden[1, 0] = bad
    with use_implementation(softmax_loss=name):
        assert not linear_cross_entropy(hidden, weight, None, torch.tensor([1, 2, 3])).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_a_column_ruled_out_leaves_the_loss_finite(name: str):
    tensors, labels = draw(6, 3, 70, has_bias=True)
    tensors[2][0] = -torch.inf  # the first column of every row
    labels.clamp_min_(1)
    leaves = [x.float().requires_grad_() for x in tensors]
    with use_implementation(softmax_loss=name):
        got = loss_of(leaves, labels)
    torch.testing.assert_close(got.double(), plain_loss(tensors, labels), rtol=1e-5, atol=1e-5)
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(got, leaves))


@pytest.mark.parametrize("name", NAMES)
def test_the_bias_is_not_rounded_to_the_products_dtype(name: str):
    hidden, weight = torch.zeros(1, 2), torch.zeros(3, 2)
    bias = torch.tensor([100.0, 100.01, 0.0])  # one number in bfloat16
    with use_implementation(softmax_loss=name), torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, bias, torch.tensor([0]))
    torch.testing.assert_close(got, F.cross_entropy(bias.unsqueeze(0), torch.tensor([0])))


def test_only_wanted_gradients_are_computed():
    tensors, labels = draw(6, 3, 11, has_bias=True)
    hidden, weight, bias = tensors
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in saved] == [hidden.shape]
    (got,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(plain_loss(tensors, labels), hidden)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pieces", [1, 2])
def test_many_rows_where_products_are_those_of_tiles(pieces: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("i3lm.ops.cross_entropy.has_tiles", lambda: True)
    monkeypatch.setattr("i3lm.ops.cross_entropy.MANY_ROWS", 20)
    turned = []

    def watched(weight: Tensor) -> tuple[Tensor, Tensor]:
        turned.append(weight.shape)
        return narrow_and_transpose(weight)

    module = sys.modules["i3lm.ops.linear.numba_transpose"]
    monkeypatch.setattr(module, "narrow_and_transpose", watched)
    N, C, V = 70, 33, 150
    tensors, labels = draw(N, C, V, has_bias=True)
    wanted = [x.float().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(wanted, labels, piece_bytes=2 * V * N // pieces)
    exact = [x.bfloat16().double().requires_grad_() for x in tensors]
    expected = plain_loss(exact, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-3, atol=3e-3)
    gradients = torch.autograd.grad(loss, wanted)
    for got, exactly in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        largest = exactly.abs().max().item()
        torch.testing.assert_close(got.double(), exactly, rtol=0, atol=2e-2 * largest)
    assert turned == [(V, C)]


@pytest.mark.parametrize("pieces", [1, 3])
def test_large_tensors_go_when_they_have_served(pieces: int, monkeypatch: pytest.MonkeyPatch):
    """The logits of a piece before those of the next; the matrix's copy before its gradient."""
    N, C, V = 12, 8, 40
    tensors, labels = draw(N, C, V, has_bias=False)
    wanted = [x.float().requires_grad_() for x in tensors]
    logits, copies, last = [], [], []

    def watched(x: Tensor, weight: Tensor, kernel: Implementation) -> Tensor:
        copies.append(weakref.ref(weight))
        assert not any(earlier() is not None for earlier in logits)
        output = _logits(x, weight, kernel)
        logits.append(weakref.ref(output))
        return output

    def last_product(x: Tensor, weight: Tensor) -> Tensor:
        output = linear(x, weight)
        if output.shape == (V, C):
            last.append(copies[-1]() is None)
        return output

    monkeypatch.setattr("i3lm.ops.cross_entropy._logits", watched)
    monkeypatch.setattr("i3lm.ops.cross_entropy.linear", last_product)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(wanted, labels, piece_bytes=2 * V * N // pieces)
    assert len(logits) == pieces
    assert last == [False] * (pieces - 1) + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_part", [False, True])
# Parts of the vocabulary, and rows that fill no vector; two tasks by rows too.
@pytest.mark.parametrize("shape", [(70, 1500), (1100, 90), (1030, 4000)])
def test_long_rows_by_any_number_of_threads(
    dtype: torch.dtype, is_part: bool, shape: tuple[int, int]
):
    R, V = shape
    draw_from = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(V, R, generator=draw_from)).to(dtype).T
    logits[3, 7], logits[4] = 80, -80
    bias, scale = torch.randn(V, generator=draw_from), torch.rand(R, generator=draw_from)
    labels = torch.randint(0, V, (R,), generator=draw_from)
    labels[3] = 7
    normalizer = None
    if is_part:
        labels[::5] = -1
        normalizer = torch.logsumexp(logits.float() + bias, dim=1) + 0.5
    results, threads = [], torch.get_num_threads()
    for name, count in (("reference", 1), ("numba", 1), ("numba", 2)):
        torch.set_num_threads(count)
        try:
            grad, sums = logits.T.clone().T, torch.ones(V)
            run = SOFTMAX_LOSS.named(name).forward
            (losses,) = run(grad, bias, labels, scale, sums, True, normalizer)
        finally:
            torch.set_num_threads(threads)
        results.append((losses, grad, sums))
    expected, once, twice = results
    assert all(map(torch.equal, once, twice))
    for got, wanted in zip(once, expected, strict=True):
        # Gradients of at most 1, in the logits' dtype; sums, and losses of logits up to 100, in
        # float32.
        relative, absolute = (2e-5, 2e-5) if got.dtype == torch.float32 else (2**-8, 1e-3)
        torch.testing.assert_close(got, wanted, rtol=relative, atol=absolute)


def test_without_gradients_none_are_computed():
    tensors, labels = draw(6, 3, 11, has_bias=True)
    leaves = [x.requires_grad_() for x in tensors]
    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(tuple(result.shape) if isinstance(result, Tensor) else None)
            return result

    with torch.no_grad(), Record():
        loss = loss_of(leaves, labels)
    torch.testing.assert_close(loss, plain_loss(leaves, labels))
    assert (6, 11) in made  # the logits
    assert (11, 3) not in made  # no gradient of the weight


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_predict_is_a_loss_of_zero(name: str, recompute: bool):
    leaves = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)]
    with use_implementation(softmax_loss=name):
        for rows in (4, 0):
            labels = torch.full((rows,), -100)
            loss = loss_of([leaves[0][:rows], leaves[1]], labels, recompute=recompute)
            assert loss.item() == 0
            assert all(not g.any() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    ("shapes", "label", "message"),
    [
        (((2, 4), (5, 3), (5,)), 0, r"weight \(5, 3\) must have shape \(V, 4\)"),
        (((2, 4), (5, 4), (6,)), 0, r"bias \(6,\) shape \(V,\)"),
        (((2, 3, 4), (5, 4), (5,)), 0, r"hidden \(2, 3, 4\) must have shape \(N, C\)"),
        (((2, 4), (5, 4), (5,)), 5, r"label 5 is outside the vocabulary: labels run from 0 to 4"),
        (((2, 4), (5, 4), (5,)), -1, r"label -1 is outside the vocabulary"),
    ],
)
def test_what_does_not_fit_is_named(shapes, label: int, message: str):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*tensors, torch.full((2,), label))


@pytest.mark.parametrize("N", [1024, 5000])
def test_small_shares_do_not_underflow_in_float16(N: int):
    """Most of N x V shares of about 1 / (N V) are less than float16's smallest number."""
    (hidden, weight), _ = draw(N, 4, 16_384, has_bias=False)
    labels = torch.arange(N) % 7
    grads = []
    for dtype, is_narrow in ((torch.float64, False), (torch.float32, True)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden / 10, weight)]
        with torch.autocast("cpu", torch.float16, enabled=is_narrow):
            loss = loss_of(leaves, labels)
        grads.append([grad.double() for grad in torch.autograd.grad(loss, leaves)])
    for exact, found in zip(*grads, strict=True):
        # A row is a position's gradient, or a token's over all positions; nearly all of the
        # tokens are in no label, so that small shares are all that they have.
        error = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.max() < 0.02


def test_double_precision_is_kept_under_autocast():
    tensors, labels = draw(6, 3, 11, has_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_of(tensors, labels)
    torch.testing.assert_close(got, plain_loss(tensors, labels), rtol=1e-12, atol=0)
