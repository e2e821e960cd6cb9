from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.ops import causal_attention
from i3lm.ops.attention import CAUSAL_ATTENTION, PACKED_ATTENTION
from i3lm.ops.attention.numba import softmax_numba
from i3lm.ops.attention.tiles import HEADS, TILE, softmax_torch
from i3lm.ops.dispatch import use_implementation
from tests.ops.drawing import make_generator

CPU = torch.device("cpu")
# Those that serve bfloat16 here: not every processor has AMX.
NAMES = [i.name for i in CAUSAL_ATTENTION.implementations if not i.refuses(CPU, torch.bfloat16)]


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None = None
) -> Tensor:
    """Causal attention as the formula says, with the whole matrix of weights."""
    T = query.shape[2]
    scores = query @ key.mT / query.shape[3] ** 0.5
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    if first is not None:
        hidden = hidden | (torch.arange(T) < first[:, None, :, None])
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ value


def draw_first(B: int, T: int, generator: torch.Generator) -> Tensor:
    """Where random documents of some thirty tokens begin, for each of their tokens, (B, T)."""
    marks = torch.rand(B, T, generator=generator) < 1 / 30
    return torch.where(marks, torch.arange(T), 0).cummax(dim=1).values


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    T=st.sampled_from([1, 2, 17, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]),
    D=st.sampled_from([1, 8, 32, 40, 64]),
)
def test_bfloat16_equals_the_formula(name: str, B: int, H: int, T: int, D: int):
    generator = make_generator(B, H, T, D)
    low = [torch.randn(B, H, T, D, generator=generator).bfloat16().requires_grad_() for _ in "qkv"]
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
    with use_implementation(causal_attention=name):
        got = causal_attention(*low)
    expected = exact_attention(*exact)
    grads = torch.autograd.grad((got * weights.bfloat16()).sum(), low)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    assert got.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a sum of rounded terms of size 1 errs by a few times 2^-8.
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
        assert error < 2e-2


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (i.name, dtype)
        for i in PACKED_ATTENTION.implementations
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        if i.refuses(CPU, dtype) is None
    ],
    ids=str,
)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 5),
    H=st.sampled_from([1, 3, HEADS // 2, HEADS + 1]),
    T=st.sampled_from([1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]),
)
def test_each_token_sees_from_its_first_on(name: str, dtype: torch.dtype, B: int, H: int, T: int):
    generator = make_generator(B, H, T)
    first = draw_first(B, T, generator)
    exact = [torch.randn(B, H, T, 4, generator=generator, dtype=torch.float64) for _ in "qkv"]
    given = [x.to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in given]
    weights = torch.randn(B, H, T, 4, generator=generator, dtype=torch.float64)
    with use_implementation(packed_attention=name):
        got = causal_attention(*given, first=first)
    expected = exact_attention(*exact, first)
    grads = torch.autograd.grad((got * weights.to(dtype)).sum(), given)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    # Sums of up to 261 terms in float64 and float32; for bfloat16 as above.
    most = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip((got, *grads), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() / b.abs().max().clamp_min(1) < most


def test_keys_and_values_that_do_not_fit_are_refused():
    query = torch.zeros(1, 2, 64, 32, dtype=torch.bfloat16)
    for wrong in (query[:, :, :-1], query[:, :1], query[..., :16], query.float()):
        with pytest.raises(
            ValueError, match=r"^key \(.*\) must be as query \(torch\.bfloat16, \(1, 2,"
        ):
            causal_attention(query, wrong, query)
        with pytest.raises(ValueError, match=r"^value \(.*\) must be as query"):
            causal_attention(query, query, wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_a_window_is_a_first(name: str, window: int):
    generator = make_generator(window)
    inputs = [torch.randn(2, 2, 200, 32, generator=generator).bfloat16() for _ in "qkv"]
    first = (torch.arange(200) + 1 - window).expand(2, -1)  # before 0 at the beginning
    with use_implementation(packed_attention=name):
        got = causal_attention(*inputs, first=first)
    expected = exact_attention(*(x.double() for x in inputs), first)
    assert (got.double() - expected).abs().max() < 2e-2 * expected.abs().max()


# These look inside a kernel that only some processors can run; what holds for every implementation
# is tested without a mark, for those that there are.
needs_amx = pytest.mark.skipif("amx" not in NAMES, reason="this processor has no AMX")


def amx_and_gradients(inputs: list[Tensor], grad: Tensor, first: Tensor | None) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    with use_implementation(causal_attention="amx", packed_attention="amx"):
        got = causal_attention(*inputs, first=first)
    return [got, *torch.autograd.grad(got, inputs, grad)]


@needs_amx
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 5),
    T=st.integers(1, 170),
    D=st.sampled_from([8, 32, 64, 96]),
    packed=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_amx_rounds_weights_and_results_alone(
    B: int, H: int, T: int, D: int, packed: bool, size: float
):
    """Scores stay in float32; each number is as near as roundings to 8 bits (2^-9) leave it."""
    generator = make_generator(B, H, T, D)
    drawn = [torch.randn(B, H, T, D, generator=generator) for _ in range(4)]
    *inputs, grad = (x.mul(y).bfloat16() for x, y in zip(drawn, (size, size, 1, 1), strict=True))
    first = draw_first(B, T, generator) if packed else None
    query, key, value = (x.double().requires_grad_() for x in inputs)
    output = exact_attention(query, key, value, first)
    wanted = [output, *torch.autograd.grad(output, (query, key, value), grad.double())]
    with torch.no_grad():
        one = torch.eye(T, dtype=torch.float64).expand(B, H, T, T)
        weights = exact_attention(query, key, one, first)
        means = (grad.double() * output).sum(-1, keepdim=True)
        of_scores = weights * (grad.double() @ value.mT - means)
        # The mean is of rounded outputs, so it is wrong by as much as their products may be.
        wrong = of_scores.abs() + weights * (grad.double() * output).abs().sum(-1, keepdim=True)
        scale = D**-0.5
        terms = (
            weights @ value.abs(), scale * wrong @ key.abs(), scale * wrong.mT @ query.abs(),
            weights.mT @ grad.double().abs(),
        )  # fmt: skip
    for got, exact, most in zip(amx_and_gradients(inputs, grad, first), wanted, terms, strict=True):
        assert ((got.double() - exact).abs() <= 2**-8 * 1.05 * (most + exact.abs()) + 1e-5).all()


@needs_amx
def test_amx_gives_the_same_bits_anywhere():
    """With any number of threads, from any place in memory, and alone or in a batch."""
    generator = make_generator(5)
    joined = torch.randn(2, 70, 3, 3, 32, generator=generator).bfloat16()
    views = [part.transpose(1, 2) for part in joined.unbind(2)]
    grad = torch.randn(2, 3, 70, 32, generator=generator).bfloat16()
    first = draw_first(2, 70, generator)
    expected = amx_and_gradients(views, grad, first)
    forms = [amx_and_gradients([x.contiguous() for x in views], grad, first)]
    elsewhere = [torch.cat([x.new_zeros(7), x.flatten()])[7:].view_as(x) for x in views]
    forms.append(amx_and_gradients(elsewhere, grad.mT.contiguous().mT, first))
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        forms.append(amx_and_gradients(views, grad, first))
    torch.set_num_threads(threads)
    alone = [
        amx_and_gradients([x[b:][:1] for x in views], grad[b:][:1], first[b:][:1]) for b in (0, 1)
    ]
    forms.append([torch.cat(pair) for pair in zip(*alone, strict=True)])
    for form in forms:
        assert all(a.equal(b) for a, b in zip(form, expected, strict=True))


@needs_amx
@pytest.mark.parametrize("T", [1, 32, 70, 200])
@pytest.mark.parametrize("D", [32, 96])
def test_amx_stays_in_its_scratch_memory(T: int, D: int):
    from i3lm.ops.attention import amx

    made = []

    def set_up(x: Tensor, scale: float, backward: bool):
        sizes, _, (shapes, _, tasks) = made_before(x, scale, backward)
        room = torch.full((4096 + 64 + tasks * sizes.room + 4096,), 0xA5, dtype=torch.uint8)
        start = -(-(room.data_ptr() + 4096) // 64) * 64
        made.append((room, start - room.data_ptr(), tasks * sizes.room))
        return sizes, room, (shapes, start, tasks)

    made_before = amx._set_up
    inputs = torch.randn(3, 2, 3, T, D, generator=make_generator(T, D)).bfloat16().unbind()
    expected = amx_and_gradients(inputs, torch.ones(2, 3, T, D).bfloat16(), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "_set_up", set_up)
        got = amx_and_gradients(inputs, torch.ones(2, 3, T, D).bfloat16(), None)
    assert len(made) == 2
    for room, start, size in made:
        assert (room[:start] == 0xA5).all()
        assert (room[start + size :] == 0xA5).all()
        assert (room[start : start + size] != 0xA5).any()
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


def test_a_target_without_amx_is_respected(tmp_path: Path):
    """Else the compiler would end the process."""
    code = (
        "import torch; from i3lm.ops import causal_attention as attend; "
        "x = torch.ones(1, 1, 40, 32, dtype=torch.bfloat16); print(attend(x, x, x).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "1280.0\n"), done.stderr


@needs_amx
def test_amx_keeps_nothing_that_grows_with_the_square_of_a_text():
    kept = []
    x = torch.randn(1, 2, 999, 32, generator=make_generator(1)).bfloat16().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
        use_implementation(causal_attention="amx"),
    ):
        causal_attention(x, x, x)
    assert 0 < sum(kept) <= 5 * x.numel()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 2, 9, 32), (2, 2, 0, 32)], ids=str)
def test_nothing_in_gives_nothing(name: str, shape: tuple[int, ...]):
    x = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    with use_implementation(causal_attention=name):
        got = causal_attention(x, x, x)
    got.sum().backward()
    assert got.shape == x.grad.shape == shape


def test_tiles_pass_over_the_keys_of_other_documents():
    generator = make_generator(7)
    query, key, value = (torch.randn(1, 2, 300, 4, generator=generator) for _ in "qkv")
    value[:, :, :150] = float("nan")  # zero times it would show
    first = torch.where(torch.arange(300) < 150, 0, 150)[None]
    with use_implementation(packed_attention="tiles"):
        got = causal_attention(query, key, value, first=first)
    expected = exact_attention(*(x[:, :, 150:] for x in (query, key, value)))
    torch.testing.assert_close(got[:, :, 2 * TILE :], expected[:, :, 2 * TILE - 150 :])


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), r"\(torch.int64, \(2, 8\)\) must be .* \(2, 9\)"),
        (torch.zeros(2, 9), r"^first \(torch.float32, \(2, 9\)\) must be torch.int64 of shape"),
    ],
)
def test_a_first_that_does_not_fit_is_refused(first: Tensor, message: str):
    x = torch.zeros(2, 1, 9, 4)
    with pytest.raises(ValueError, match=message):
        causal_attention(x, x, x, first=first)


def test_no_token_sees_a_later_one():
    generator = make_generator(3)
    query, key, value = (torch.randn(1, 2, 300, 8, generator=generator).bfloat16() for _ in "qkv")
    before = causal_attention(query, key, value)
    key[:, :, 200:], value[:, :, 200:] = 9.0, -9.0
    after = causal_attention(query, key, value)
    assert torch.equal(after[:, :, :200], before[:, :, :200])
    assert not torch.equal(after[:, :, 200:], before[:, :, 200:])


def test_other_dtypes_are_pytorchs_own():
    generator = make_generator(4)
    exact = [torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in "qkv"]
    torch.testing.assert_close(causal_attention(*exact), exact_attention(*exact))


def draw_first_of_tile(N: int, R: int, before: int, generator: torch.Generator) -> Tensor:
    """The first key that each query of a tile sees, (N, R)."""
    return (torch.rand(N, R, generator=generator) * (before + 1 + torch.arange(R))).long()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 3),
    heads=st.integers(1, 3),
    R=st.integers(1, 70),
    before=st.integers(0, 150),
    packed=st.booleans(),
    size=st.sampled_from([1.0, 100.0]),
)
def test_weights_of_a_tile(B: int, heads: int, R: int, before: int, packed: bool, size: float):
    generator = make_generator(B, heads, R, before)
    scores = torch.randn(B * heads, R, before + R, generator=generator).mul(size).bfloat16()
    first = draw_first_of_tile(B, R, before, generator) if packed else None
    expected = softmax_torch(scores.double(), first, heads, before, 0.3)
    got = softmax_numba(scores.clone(), first, heads, before, 0.3)
    # Rounded once, to 8 bits; the kernel's exponential ends at e^-87.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-30)
    assert not got[expected == 0].any()  # what is hidden
    elsewhere = torch.cat([scores.new_zeros(7), scores.flatten()])[7:].view_as(scores)
    assert torch.equal(softmax_numba(elsewhere, first, heads, before, 0.3), got)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_score_shows(name: str, bad: float):
    # Where T is no multiple of 32, oneDNN's products by AMX multiply the beginning of the next row
    # by zero, and a NaN reaches one row too far.
    query, key, value = torch.ones(3, 1, 2, 256, 8).bfloat16().unbind()
    query[0, 1, 150, 3] = bad
    with use_implementation(causal_attention=name):
        got = causal_attention(query, key, value)
    assert not got[0, 1, 150].isfinite().any()
    assert got[0, 0].isfinite().all()
    assert got[0, 1, :150].isfinite().all()
