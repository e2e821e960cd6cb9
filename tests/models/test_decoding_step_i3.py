"""A token by the fused kernels of a decoding step is a token by the modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from i3lm.inference.loading import hold_weights_in_bf16
from i3lm.inference.sessions import cache_states
from i3lm.layers import Linear
from i3lm.models.i3 import I3Cache, I3ForCausalLM
from i3lm.models.i3.cache_i3 import CarriedState
from i3lm.models.i3.decoding_i3 import TokenByKernels
from i3lm.ops.decoding_step import DECODING_STEP, FEW_ROWS, decoding_kernels
from i3lm.ops.dispatch import use_implementation
from tests.models.tiny_i3 import KINDS, UNLIMITED, draw_ids, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
modules_alone = partial(use_implementation, decoding_step="modules")

# float32 logits of size 2 to 7 and sums in another order: a few 1e-6 as measured. With matrices
# of bfloat16 or int8 both sides read the same matrices and compute in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have run, by name."""
    calls: list[str] = []
    run, run_whole = TokenByKernels.run, TokenByKernels.run_whole

    def noted(self, stretch, x):
        calls.extend(self.plan.halves[number].kernel for number in stretch.halves)
        return run(self, stretch, x)

    def noted_whole(self, ids, positions):
        calls.extend(["embedding", *(half.kernel for half in self.plan.halves), "head"])
        return run_whole(self, ids, positions)

    monkeypatch.setattr(TokenByKernels, "run", noted)
    monkeypatch.setattr(TokenByKernels, "run_whole", noted_whole)
    return calls


@torch.no_grad()
def read(model: I3ForCausalLM, ids: Tensor) -> I3Cache:
    """The cache after a text."""
    return model(ids, use_cache=True).cache


@torch.no_grad()
def decode(model: I3ForCausalLM, ids: Tensor, cache: I3Cache) -> Tensor:
    """Logits (B, T, V) of one token after the other."""
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(ids.shape[1])]
    return torch.cat(steps, dim=1)


def check_equal(model: I3ForCausalLM, ids: Tensor, prompt: int = 4) -> None:
    """Logits and states of both ways agree, after the prompt and to the end."""
    cache = read(model, ids[:, :prompt])
    other = copy.deepcopy(cache)
    logits = decode(model, ids[:, prompt:], cache)
    with modules_alone():
        expected = decode(model, ids[:, prompt:], other)
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(cache_states(cache), cache_states(other), **CLOSE)


@every_kind
@pytest.mark.parametrize("B", [1, FEW_ROWS])
def test_logits_and_states_are_the_modules(kind: str, B: int, fused: list[str]):
    check_equal(make_model(kind), draw_ids(B, 20))
    assert fused or kind == "v1"


@every_kind
def test_bf16_matrices(kind: str, fused: list[str]):
    check_equal(hold_weights_in_bf16(make_model(kind)), draw_ids(1, 12))
    assert fused or kind == "v1"


@every_kind
def test_left_padding(kind: str, fused: list[str]):
    model, ids = make_model(kind), draw_ids(3, 20)
    mask = (torch.arange(20) >= torch.tensor([[0], [2], [3]])).long()
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
        other = copy.deepcopy(cache)
        for t in range(4, 20):
            step = partial(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1])
            logits = step(cache=cache).logits
            with modules_alone():
                expected = step(cache=other).logits
            torch.testing.assert_close(logits, expected, **CLOSE)
    assert fused or kind == "v1"


@pytest.mark.parametrize("kind", ["rwkv4", "state_space"])
def test_int8_matrices(kind: str, fused: list[str]):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from i3lm.inference.int8_linear import use_int8_products

    model = make_model(kind)
    read_one = partial(decode, model, draw_ids(1, 1))
    read_one(read(model, draw_ids(1, 4)))  # what is looked up here must not be used below
    fused.clear()
    quantize_(model, Int8WeightOnlyConfig(version=2), lambda m, _: isinstance(m, Linear))
    use_int8_products(model)
    check_equal(model, draw_ids(2, 12))
    assert {"attention", "feed_forward"} <= set(fused)


@pytest.mark.parametrize("kind", UNLIMITED)
def test_a_long_text(kind: str):
    model = make_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mixer.mix"):
                parameter.clamp_(0, 1)  # else the average grows without bound
    check_equal(model, draw_ids(1, 300))


@pytest.mark.parametrize("kind", ["rwkv4", "state_space", "hybrid rwkv4"])
def test_both_ways_take_turns(kind: str):
    model, ids = make_model(kind), draw_ids(1, 20)
    cache = read(model, ids[:, :4])
    other, pieces = copy.deepcopy(cache), []
    for t in range(4, 20):
        with use_implementation(decoding_step=("numba", "modules")[t % 2]):
            pieces.append(decode(model, ids[:, t : t + 1], cache))
    with modules_alone():
        expected = decode(model, ids[:, 4:], other)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)


def test_every_half_of_a_layer_is_fused(fused: list[str]):
    model = make_model("rope")
    decode(model, draw_ids(1, 1), read(model, draw_ids(1, 4)))
    assert fused == [
        "embedding",
        *["time_mix", "channel_mix"],
        *["attention", "feed_forward"],
        *["time_mix", "attention", "channel_mix"],
        "head",
    ]


def test_layers_with_maps_of_low_rank_are_called_as_modules(fused: list[str]):
    model = make_model("v1")
    decode(model, draw_ids(1, 1), read(model, draw_ids(1, 4)))
    assert not fused


@torch.no_grad()
def test_extreme_numbers_pass_as_through_the_modules():
    model = make_model("rwkv4")
    for layer in model.model.layers[:2]:
        layer.mixer.time_decay.copy_(torch.linspace(-100, 100, 12))
        layer.mixer.receptance.weight.mul_(100)
        layer.feed_forward.receptance.weight.mul_(100)
    check_equal(model, draw_ids(1, 12))


def test_a_diverged_model_shows_as_one():
    model = make_model("rwkv4")
    with torch.no_grad():
        model.model.layers[1].mixer.key.weight[3, 3] = float("nan")
    assert decode(model, draw_ids(1, 1), read(model, draw_ids(1, 4))).isnan().all()


class _Doubled(Linear):
    """Stands for an adapter: a linear map with more to it."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _double(layer: nn.Module) -> None:
    layer.mixer.key.__class__ = _Doubled


def _replace(layer: nn.Module) -> None:
    other = Linear(12, 12, bias=False)
    nn.init.normal_(other.weight)
    layer.mixer.value = other


def _hook(layer: nn.Module) -> None:
    layer.mixer.output.register_forward_hook(lambda module, inputs, output: 2 * output)


def _wrap_forward(layer: nn.Module) -> None:
    forward = layer.feed_forward.value.forward
    layer.feed_forward.value.forward = lambda x: 2 * forward(x)


def _new_parameter(layer: nn.Module) -> None:
    layer.mixer_norm.weight = nn.Parameter(torch.randn(12))


def _new_data(layer: nn.Module) -> None:
    layer.mixer.receptance.weight.data = torch.randn(12, 12)


def _in_place(layer: nn.Module) -> None:
    layer.mixer.time_first.data.add_(1)


def _parametrize(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer.mixer.key)
    layer.mixer.key.parametrizations.weight.original0.data.mul_(2)


def _in_bf16(layer: nn.Module) -> None:
    layer.mixer.key.weight = nn.Parameter(layer.mixer.key.weight.bfloat16(), False)


@pytest.mark.parametrize(
    "change",
    [
        _double,
        _replace,
        _hook,
        _wrap_forward,
        _new_parameter,
        _new_data,
        _in_place,
        _parametrize,
        _in_bf16,
    ],
)
def test_what_happens_to_a_module_counts_at_the_next_token(change: Callable[[nn.Module], None]):
    model, ids = make_model("rwkv4"), draw_ids(1, 6)
    cache = read(model, ids[:, :4])
    decode(model, ids[:, 4:5], cache)
    unchanged = decode(model, ids[:, 5:], copy.deepcopy(cache))
    change(model.model.layers[1])
    other = copy.deepcopy(cache)
    logits = decode(model, ids[:, 5:], cache)
    assert not torch.allclose(logits, unchanged, rtol=1e-3, atol=1e-3) or change is _in_bf16
    with modules_alone():
        torch.testing.assert_close(logits, decode(model, ids[:, 5:], other), **CLOSE)


def _new_embedding(model: I3ForCausalLM) -> None:
    model.set_input_embeddings(nn.Embedding(*model.get_input_embeddings().weight.shape))


def _new_position_data(model: I3ForCausalLM) -> None:
    table = model.model.embed_positions.weight
    table.data = torch.randn_like(table)


def _hook_norm(model: I3ForCausalLM) -> None:
    model.model.norm.register_forward_hook(lambda module, inputs, output: -output)


def _new_head(model: I3ForCausalLM) -> None:
    head = Linear(model.lm_head.in_features, model.lm_head.out_features)
    nn.init.normal_(head.weight)
    model.set_output_embeddings(head)


def _wrap_head(model: I3ForCausalLM) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)


def _hook_model(model: I3ForCausalLM) -> None:
    def double(module, inputs, output):
        output.last_hidden_state = 2 * output.last_hidden_state

    model.model.register_forward_hook(double)


@pytest.mark.parametrize(
    "change",
    [_new_embedding, _new_position_data, _hook_norm, _new_head, _wrap_head, _hook_model],
)
@pytest.mark.parametrize("how", ["cached", "padded"])
def test_what_happens_before_and_behind_the_layers_counts_at_the_next_token(
    change: Callable[[I3ForCausalLM], None], how: str
):
    model, ids = make_model("rwkv4"), draw_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 0] = 1 if how == "cached" else 0

    @torch.no_grad()
    def step(t: int, cache: I3Cache) -> Tensor:
        seen = mask[:, : t + 1]
        return model(ids[:, t : t + 1], attention_mask=seen, cache=cache).logits

    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
    step(4, cache)
    unchanged = step(5, copy.deepcopy(cache))
    change(model)
    other = copy.deepcopy(cache)
    logits = step(5, cache)
    assert not torch.allclose(logits, unchanged, rtol=1e-3, atol=1e-3)
    with modules_alone():
        torch.testing.assert_close(logits, step(5, other), **CLOSE)


def test_what_modules_refuse_kernels_do_not_take():
    model = make_model("rwkv4")
    cache = read(model, draw_ids(1, 4))
    decode(model, draw_ids(1, 1), cache)
    one, size = draw_ids(1, 1), model.config.vocab_size
    for wrong in (torch.full_like(one, size), torch.full_like(one, -1)):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            decode(model, wrong, cache)
    with pytest.raises(IndexError), torch.no_grad():
        model(one, position_ids=torch.full_like(one, -1), cache=cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="max_position_embeddings"):
        decode(model, one.expand(1, model.config.max_position_embeddings), cache)


def test_generate_leaves_a_token_to_the_kernels_alone(fused: list[str]):
    model = make_model("rope")
    model.generate(draw_ids(2, 4), max_new_tokens=4, do_sample=False)
    assert fused.count("embedding") == fused.count("head") == 3  # after the prompt's


def test_a_hook_on_all_modules_is_called_for_each():
    model = make_model("rwkv4")
    cache = read(model, draw_ids(1, 4))
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module))
    )
    try:
        decode(model, draw_ids(1, 1), cache)
    finally:
        handle.remove()
    assert seen.count(Linear) == sum(type(module) is Linear for module in model.modules())


def test_a_layer_whose_forward_pass_is_replaced_is_called_as_it_is(fused: list[str]):
    model = make_model("rwkv4")
    layer = model.model.layers[1]
    forward, calls = layer.forward, []

    def replaced(x, step=None, **kwargs):
        calls.append(step)
        return forward(x, **kwargs)

    layer.forward = replaced
    check_equal(model, draw_ids(1, 6))
    assert set(calls) == {None}
    assert fused.count("time_mix") == 2  # of the other layer, for each token


def test_a_hook_on_a_layer_is_told_what_the_kernels_computed(fused: list[str]):
    model = make_model("rwkv4")
    seen: list[Tensor] = []
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    check_equal(model, draw_ids(1, 6))
    told, expected = seen[1:3], seen[3:]  # after the prompt
    torch.testing.assert_close(told, expected, **CLOSE)
    assert fused.count("time_mix") == 2 * 2


def _reorder(cache: I3Cache) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def _put_another_state(cache: I3Cache) -> None:
    states = cache.layers[0].recurrent_states
    states[0] = torch.rand_like(states[0])


def _change_in_place(cache: I3Cache) -> None:
    cache.layers[0].recurrent_states[0].mul_(2)


def _forget_everything(cache: I3Cache) -> None:
    cache.reset()


@pytest.mark.parametrize("kind", ["rope", "state_space"])
@pytest.mark.parametrize(
    "change", [_reorder, _put_another_state, _change_in_place, _forget_everything]
)
def test_what_happens_to_a_cache_counts_at_the_next_token(
    kind: str, change: Callable[[I3Cache], None]
):
    model, ids = make_model(kind), draw_ids(2, 8)
    cache = read(model, ids[:, :4])
    decode(model, ids[:, 4:6], cache)
    other = copy.deepcopy(cache)
    torch.manual_seed(0)
    change(cache)
    torch.manual_seed(0)
    change(other)
    logits = decode(model, ids[:, 6:], cache)
    with modules_alone():
        torch.testing.assert_close(logits, decode(model, ids[:, 6:], other), **CLOSE)
    torch.testing.assert_close(cache_states(cache), cache_states(other), **CLOSE)


@every_kind
def test_texts_take_turns(kind: str):
    model, texts = make_model(kind), [draw_ids(1, 12), draw_ids(1, 12).flip(1), draw_ids(2, 12)]
    caches = [read(model, ids[:, :4]) for ids in texts]
    pieces = [
        [decode(model, ids[:, t : t + 1], cache) for t in range(4, 12)]
        for ids, cache in zip(texts, copy.deepcopy(caches), strict=True)
    ]
    for t in range(4, 12):
        for ids, cache, alone in zip(texts, caches, pieces, strict=True):
            logits = decode(model, ids[:, t : t + 1], cache)
            torch.testing.assert_close(logits, alone[t - 4], rtol=0, atol=0)


def test_hidden_states_are_recorded():
    model = make_model("rope")
    cache = read(model, draw_ids(1, 4))
    other, step = copy.deepcopy(cache), partial(model, draw_ids(1, 1), output_hidden_states=True)
    with torch.no_grad():
        states = step(cache=cache).hidden_states
        with modules_alone():
            expected = step(cache=other).hidden_states
    assert len(states) == 4
    torch.testing.assert_close(states, expected, **CLOSE)


def test_a_model_that_has_decoded_is_copied_and_pickled():
    model, ids = make_model("rwkv4"), draw_ids(1, 6)
    cache = read(model, ids[:, :4])
    decode(model, ids[:, 4:5], cache)
    expected = decode(model, ids[:, 5:], copy.deepcopy(cache))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(decode(other, ids[:, 5:], copy.deepcopy(cache)), expected)
        with torch.no_grad():
            other.model.layers[0].mixer.key.weight.mul_(-1)
        assert not torch.allclose(decode(other, ids[:, 5:], copy.deepcopy(cache)), expected)


def test_parameters_are_let_go_when_the_model_moves():
    model = make_model("rwkv4")
    decode(model, draw_ids(1, 1), read(model, draw_ids(1, 4)))
    assert model._decoding_step._known is not None
    model.double()
    assert model._decoding_step._known is None


def test_gradients_padding_autocast_and_doubles_take_the_modules(fused: list[str]):
    model, one = make_model("rwkv4"), draw_ids(1, 1)
    cache = read(model, draw_ids(1, 4))
    assert model(one, cache=copy.deepcopy(cache)).logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(one, cache=copy.deepcopy(cache))
    with torch.no_grad():
        padded = torch.tensor([[1, 1, 1, 1, 0]])
        model(one, attention_mask=padded, cache=copy.deepcopy(cache))
        model(one, use_cache=False)
        model(one, use_cache=True)  # the first token has no states yet
    decode(model.double(), one, read(model, draw_ids(1, 4)))
    recurrent = {"time_mix", "channel_mix"}
    assert not recurrent & set(fused)


@torch.no_grad()
def test_packed_rows_and_carried_states_take_the_modules(fused: list[str]):
    model, one = make_model("state_space"), draw_ids(1, 1)
    decode(model, one, read(model, draw_ids(1, 4)))
    assert "feed_forward" in fused
    fused.clear()
    model(one, reset=torch.ones(1, 1, dtype=torch.bool))
    model(one, carried_state=CarriedState(model.config))
    assert not fused


@pytest.mark.parametrize("kind", ["rwkv4", "state_space", "hybrid rwkv4"])
def test_adapters_are_called_as_modules(kind: str, fused: list[str]):
    pytest.importorskip("peft")
    from i3lm.training.adapters import add_adapter
    from i3lm.training.options import AdapterOptions

    model = make_model(kind)
    ids = draw_ids(1, 8)
    decode(model, ids[:, 4:], read(model, ids[:, :4]))  # what is looked up must not be used below
    fused.clear()
    add_adapter(model, AdapterOptions(rank=2, targets=["recurrent"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    check_equal(model, ids)
    assert not {"time_mix", "state_space"} & set(fused)
    assert fused or kind == "hybrid rwkv4"  # where no layer is without a recurrence


def test_another_kernel_that_is_asked_for_runs(fused: list[str]):
    model, ids = make_model("rwkv4"), draw_ids(1, 8)
    cache = read(model, ids[:, :4])
    with use_implementation(wkv="reference"):
        decode(model, ids[:, 4:], cache)
        assert not fused
        with torch.no_grad():
            choice = DECODING_STEP.choose(torch.device("cpu"), torch.float32)
        assert "wkv is asked to run as reference" in choice.reason
        with (
            use_implementation(decoding_step="numba"),
            pytest.raises(ValueError, match=r"decoding_step.*refuses: wkv is asked"),
        ):
            decode(model, ids[:, 4:], cache)


@torch.no_grad()
def test_kernels_serve_one_new_token_of_a_few_rows():
    def served(B: int, T: int, dtype: torch.dtype = torch.float32) -> bool:
        return decoding_kernels(torch.zeros(B, T, 12), dtype) is not None

    assert all([served(1, 1), served(FEW_ROWS, 1)])
    assert not any([served(FEW_ROWS + 1, 1), served(0, 1), served(1, 2)])
    assert not any([served(1, 1, torch.float64), served(1, 1, torch.bfloat16)])
    with torch.enable_grad():
        assert not served(1, 1)
