"""Gradient norm and AdamW against PyTorch's own, and against the plain form in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i3lm.ops import adamw
from i3lm.ops.adamw import AdamWSettings, adamw_step, average_shape, gradient_norm
from i3lm.ops.adamw.float8 import BLOCK, NEAREST, decode, encode, records_of
from i3lm.ops.dispatch import use_implementation

RATES = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Around the kernel's pieces of 1,024 and tasks of 65,536, empty and scalar ones among them.
SHAPES = [(0,), (), (1,), (3, 5), (1023,), (1024,), (1025,), (65536,), (2, 65537), (257, 259)]
IMPLEMENTATIONS = adamw.ADAMW_STEP.names


def normals(shapes, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def settings_of(step: int) -> AdamWSettings:
    return AdamWSettings(RATES["lr"], RATES["betas"], RATES["eps"], RATES["weight_decay"], step)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_are_those_of_pytorch(implementation: str):
    """Some roundings per step, in float32: a few last bits after ten."""
    ours = normals(SHAPES, 0)
    theirs = [torch.nn.Parameter(x.clone().double()) for x in ours]
    optimizer = torch.optim.AdamW(theirs, **RATES)
    averages, squares = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in range(1, 11):
        gradients = normals(SHAPES, step)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = 0.25 * gradient.double()
        optimizer.step()
        with use_implementation(adamw_step=implementation):
            adamw_step(
                ours, gradients, averages, squares, [settings_of(step)] * len(ours), scale=0.25
            )
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q.data, rtol=2e-6, atol=2e-6)
        if p.numel():
            state = optimizer.state[q]
            i = next(i for i, x in enumerate(ours) if x is p)
            torch.testing.assert_close(averages[i].double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(
                squares[i].double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-7
            )


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8),
    steps=st.integers(1, 10_000),
    narrow=st.booleans(),
    scale=st.floats(0, 2),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=50)
def test_numba_is_the_reference(shapes, steps: int, narrow: bool, scale: float, seed: int):
    kinds = [torch.bfloat16 if narrow and i % 2 else torch.float32 for i in range(len(shapes))]
    gradients = [x.to(k) for x, k in zip(normals(shapes, seed), kinds, strict=True)]
    results = {}
    for name, dtype in (("numba", torch.float32), ("reference", torch.float64)):
        p, m, v = (normals(shapes, seed + k, dtype) for k in (1, 2, 3))
        v = [x.square() for x in v]
        with use_implementation(adamw_step=name):
            adamw_step(p, gradients, m, v, [settings_of(steps)] * len(p), scale=scale)
        results[name] = [*p, *m, *v]
    for ours, exact in zip(results["numba"], results["reference"], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", adamw.GRADIENT_NORM.names)
def test_norm_is_that_of_all_numbers_at_once(implementation: str):
    gradients = normals(SHAPES, 0)
    gradients[4] = gradients[4].bfloat16()
    gradients[9] = gradients[9].T  # not contiguous
    exact = torch.cat([gradient.double().flatten() for gradient in gradients]).norm().item()
    with use_implementation(gradient_norm=implementation):
        assert gradient_norm(gradients) == pytest.approx(exact, rel=1e-7)
        assert gradient_norm([]) == 0
        for bad in (float("inf"), float("nan")):
            assert not torch.tensor(gradient_norm([*gradients, torch.tensor([bad])])).isfinite()


@given(
    rows=st.integers(1, 300),
    width=st.sampled_from([1, 7, 512, 1000, 1024, 3000]),
    count=st.integers(0, 40),
    kept=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_a_sparse_gradient_gives_the_bits_of_its_dense_form(
    rows: int, width: int, count: int, kept: torch.dtype, seed: int
):
    """Rows that are left out decay too, and ids that come several times are added up in order."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (count,), generator=draw)
    table = torch.nn.Parameter(torch.zeros(rows, width))
    parts = normals([(count, width)], seed)[0]
    torch.nn.functional.embedding(ids, table).backward(parts)
    dense, table.grad = table.grad, None
    torch.nn.functional.embedding(ids, table, sparse=True).backward(parts)
    assert table.grad.is_sparse
    results = []
    for gradient in (dense, table.grad):
        first, p, m, v = normals([(5,), *[(rows, width)] * 3], seed + 1)
        of_first = (as_kept([first.abs()], kept, signed)[0] for signed in (True, False))
        beside = first.clone().abs(), *of_first
        m, v = as_kept([m], kept, True)[0], as_kept([v.abs()], kept, False)[0]
        pairs = [[x, y] for x, y in zip(beside, (p, m, v), strict=True)]
        gradients = [first, gradient]
        with use_implementation(adamw_step="numba"):
            adamw_step(pairs[0], gradients, *pairs[1:], [settings_of(3)] * 2, scale=0.5)
        results.append([x for pair in pairs for x in pair])
        exact = torch.cat([first.flatten(), dense.flatten()]).double().norm().item()
        assert gradient_norm(gradients) == pytest.approx(exact, rel=1e-6)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sparse_gradient_by_hand(implementation: str):
    """Row 2 comes twice, row 0 once and row 1 not at all; the first step moves by the rate."""
    gradient = torch.sparse_coo_tensor(
        [[2, 0, 2]], [[1.0], [-1.0], [-4.0]], (3, 1), check_invariants=True
    )
    p, m, v = torch.ones(3, 1), torch.zeros(3, 1), torch.zeros(3, 1)
    m[1], v[1] = 0.5, 0.25
    rates = AdamWSettings(0.1, (0.9, 0.99), 0.0, 0.0, 1)
    with use_implementation(adamw_step=implementation):
        adamw_step([p], [gradient], [m], [v], [rates])
    stays = 0.1 * (0.5 * 0.9 / 0.1) / (0.25 * 0.99 / 0.01) ** 0.5
    torch.testing.assert_close(p, torch.tensor([[1.1], [1 - stays], [1.1]]))
    torch.testing.assert_close(m, torch.tensor([[-0.1], [0.45], [-0.3]]))
    torch.testing.assert_close(v, torch.tensor([[0.01], [0.2475], [0.09]]))


def test_the_same_bits_with_any_number_of_threads():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p, g, m, v = (normals(SHAPES, seed) for seed in range(4))
        v = [x.abs() for x in v]
        norm = gradient_norm(g)
        adamw_step(p, g, m, v, [settings_of(3)] * len(p))
        results.append((norm, [*p, *m, *v]))
    torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert all(a.equal(b) for a, b in zip(results[0][1], results[1][1], strict=True))


NARROW = [torch.bfloat16, torch.uint8]


def as_kept(averages: list[Tensor], dtype: torch.dtype, signed: bool) -> list[Tensor]:
    """Averages in a dtype; in uint8 as records."""
    if dtype != torch.uint8:
        return [x.to(dtype) for x in averages]
    return [encode(x, signed, torch.full((x.numel(),), NEAREST)) for x in averages]


def as_numbers(average: Tensor, like: Tensor, signed: bool) -> Tensor:
    """What `as_kept` made, in float64."""
    if average.dtype == torch.uint8:
        average = decode(average, signed, like.shape)
    return average.double()


@pytest.mark.parametrize("kept", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1025,), (300, 7), (70_000,)], ids=str)
def test_narrow_averages_are_those_of_the_reference(shape: tuple[int, ...], kept: torch.dtype):
    """The random bits are the same; but last bits before rounding differ, and a few fall apart."""
    results = {}
    for name in IMPLEMENTATIONS:
        p, g, m, v = (normals([(3,), shape], seed) for seed in range(4))
        m, v = as_kept(m, kept, True), as_kept([x.abs() for x in v], kept, False)
        with use_implementation(adamw_step=name):
            for step in (1, 2):
                adamw_step(p, g, m, v, [settings_of(step)] * 2)
        m = [as_numbers(x, like, True) for x, like in zip(m, p, strict=True)]
        v = [as_numbers(x, like, False) for x, like in zip(v, p, strict=True)]
        results[name] = torch.cat([x.double().flatten() for x in (*p, *m, *v)])
    one, other = results.values()
    # By one step of what is kept, where they fall apart.
    torch.testing.assert_close(
        one, other, rtol=2**-6 if kept.is_floating_point else 1 / 8, atol=1e-4
    )
    averages = slice(one.numel() // 3, None)
    assert (one[averages] != other[averages]).double().mean() < 1e-3


@pytest.mark.parametrize("kept", NARROW, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_narrow_averages_are_right_on_average(implementation: str, kept: torch.dtype):
    """A thousand steps that each change v by less than its last bit: it still arrives."""
    size, beta2 = 4096, 0.999
    p, m = [torch.zeros(size)], as_kept([torch.zeros(size)], kept, True)
    v = as_kept([torch.ones(size)], kept, False)
    g = [torch.full((size,), 2**0.5)]
    plain = torch.ones(size, dtype=torch.bfloat16)
    for step in range(1, 1001):
        with use_implementation(adamw_step=implementation):
            settings = AdamWSettings(1e-3, (0.9, beta2), 1e-8, 0.0, step)
            adamw_step(p, g, m, v, [settings])
        plain = (plain.float() * beta2 + 2 * (1 - beta2)).bfloat16()
    exact = 2 - beta2**1000  # from 1 towards 2
    # The mean of as many numbers; each of v in 8 bits has wandered by some 20 %.
    rel = 2e-3 if kept.is_floating_point else 2e-2
    assert as_numbers(v[0], p[0], False).mean().item() == pytest.approx(exact, rel=rel)
    assert as_numbers(m[0], p[0], True).mean().item() == pytest.approx(2**0.5, rel=rel)
    assert plain.double().mean() < 1.1  # rounded to the nearest it stands still


@st.composite
def drawn_numbers(draw) -> Tensor:
    """float32 numbers over many powers of ten, zeros among them."""
    size, spread = draw(st.integers(1, 3 * BLOCK + 1)), draw(st.sampled_from([0.0, 1.0, 8.0]))
    shift = draw(st.sampled_from([-30, -8, 0, 20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    numbers = torch.randn(size, generator=generator, dtype=torch.float64)
    sizes = torch.randn(size, generator=generator, dtype=torch.float64).mul(spread).exp()
    shown = torch.rand(size, generator=generator) < 0.9
    return (numbers * sizes * shown * 10.0**shift).float()


@given(numbers=drawn_numbers(), signed=st.booleans())
@settings(deadline=None, max_examples=100)
def test_8_bits_keep_a_number_to_three_or_four_bits(numbers: Tensor, signed: bool):
    numbers = numbers if signed else numbers.abs()
    records = encode(numbers, signed, torch.full((numbers.numel(),), NEAREST))
    assert (records.dtype, records.shape) == (torch.uint8, records_of(numbers.numel()))
    kept = decode(records, signed, numbers.shape)
    for block, got in zip(numbers.split(BLOCK), kept.split(BLOCK), strict=True):
        edge = block.abs().max() * 2.0**-14
        fits = block.abs() >= edge
        error = (got - block).abs()
        assert (error[fits] <= block[fits].abs() * (2**-4 if signed else 2**-5)).all()
        assert (error[~fits] <= edge).all()
        if not signed:  # a v of zero would make a step endless
            assert (got[block > 0] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_are_right_on_average(signed: bool):
    """For numbers that lie between two codes, and for those below the smallest that have a sign."""
    sizes = torch.tensor([1.0, 0.77, 3e-3, 5e-5, *([1.3e-5, 2e-6, 0.0] if signed else [])])
    numbers = sizes.repeat(20_000, 1)
    numbers = torch.nn.functional.pad(numbers, (0, BLOCK - len(sizes)))  # a block each
    random = torch.randint(0, 2**16, numbers.shape, generator=torch.Generator().manual_seed(0))
    kept = decode(encode(numbers, signed, random.flatten()), signed, numbers.shape)
    means = kept[:, : len(sizes)].double().mean(dim=0)
    # Of 20,000 draws with a spread of at most 6 %; that of the smallest, 1 in 12, is 3.4 times it.
    torch.testing.assert_close(means, sizes.double(), rtol=0.1, atol=0)
    torch.testing.assert_close(means[:4], sizes[:4].double(), rtol=2e-3, atol=0)
    if signed:
        flipped = decode(encode(-numbers, signed, random.flatten()), signed, numbers.shape)
        assert flipped.equal(-kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_8_bits_show_what_has_diverged(implementation: str):
    p, m = [torch.zeros(300)], as_kept([torch.zeros(300)], torch.uint8, True)
    v = as_kept([torch.zeros(300)], torch.uint8, False)
    g = torch.ones(300)
    g[5], g[200] = float("nan"), float("inf")
    full = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, with all bits
    g[7], g[8] = full, -full
    with use_implementation(adamw_step=implementation):
        adamw_step(p, [g], m, v, [settings_of(1)])
    for average, signed in ((m[0], True), (v[0], False)):
        finite = decode(average, signed, g.shape).isfinite()
        assert not finite[[5, 7, 8, 200]].any()
        assert finite[2 * BLOCK :].all()
    assert p[0][:5].isfinite().all()


def test_what_does_not_fit_is_refused():
    p, g, m, v = ([torch.zeros(3, 4)] for _ in range(4))
    with pytest.raises(
        ValueError, match=r"averages\[0\] \(\(3, 4\), torch.uint8\) must have shape \(1, 130\) for"
    ):
        adamw_step(p, g, [m[0].byte()], v, [settings_of(1)])
    assert average_shape(p[0], torch.bfloat16) == (3, 4)
    with pytest.raises(ValueError, match=r"gradients\[0\] \(\(4, 3\)\) must have .* \(3, 4\)"):
        adamw_step(p, [torch.zeros(4, 3)], m, v, [settings_of(1)])
    for few in (0, 1):
        with pytest.raises(ValueError, match=rf"settings \({few}\) must be as many as .* \(2\)"):
            adamw_step(p * 2, g * 2, m * 2, v * 2, [settings_of(1)] * few)
    with pytest.raises(ValueError, match=r"averages \(2\) must be as many as .* \(1\)"):
        adamw_step(p, g, m * 2, v, [settings_of(1)])
    with pytest.raises(ValueError, match=r"gradients\[0\] must be a matrix .* one of 2 sparse"):
        adamw_step(p, [torch.zeros(3, 4).to_sparse()], m, v, [settings_of(1)])
    with use_implementation(adamw_step="numba"):
        with pytest.raises(
            ValueError,
            match=r"must be contiguous torch\.float32 on the CPU, not .* \(1, 3\)",
        ):
            adamw_step([torch.zeros(4, 3).T], g, m, v, [settings_of(1)])
        half, elsewhere = g[0].half(), g[0].to("meta")
        for wrong, named in ((half, "float16 on cpu"), (elsewhere, "float32 on meta")):
            message = rf"must be float32 or bfloat16 on the CPU, not torch\.{named}"
            with pytest.raises(ValueError, match=message):
                adamw_step(p, [wrong], m, v, [settings_of(1)])
            with (
                use_implementation(gradient_norm="numba"),
                pytest.raises(ValueError, match=message),
            ):
                gradient_norm([*g, wrong])
    assert p[0].count_nonzero() == 0
