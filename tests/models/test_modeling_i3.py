from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from i3lm.layers import CausalSelfAttention, ChannelMix, FeedForward, HybridMixer, TimeMix
from i3lm.models.i3 import I3Cache, I3Config, I3ForCausalLM, I3Model
from tests.models.tiny_i3 import KINDS, LIMITED, UNLIMITED, draw_ids, make_config, make_model

# float32 logits of size 1 to 10 through three layers, summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

every_kind = pytest.mark.parametrize("kind", KINDS)
both_initializations = pytest.mark.parametrize("initialization", ["original", "rwkv"])


@torch.no_grad()
def read_in_pieces(model: I3ForCausalLM, ids: Tensor, sizes: list[int], **masks: Tensor) -> Tensor:
    """The logits of all tokens, read in pieces of the sizes through one cache."""
    cache, logits, seen = None, [], 0
    for size in sizes:
        piece = slice(seen, seen + size)
        known = {name: mask[:, : seen + size] for name, mask in masks.items()}
        output = model(ids[:, piece], cache=cache, use_cache=True, **known)
        cache, seen = output.cache, seen + size
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@every_kind
def test_later_tokens_do_not_change_earlier_logits(kind: str):
    model, ids = make_model(kind), draw_ids(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        ids[:, 13:] = (ids[:, 13:] + 1) % 37
        after = model(ids).logits
    torch.testing.assert_close(after[:, :13], before[:, :13], **CLOSE)
    assert not torch.allclose(after[:, 13], before[:, 13], **CLOSE)


@every_kind
def test_every_earlier_token_changes_the_last_logits(kind: str):
    model, ids = make_model(kind), draw_ids(1, 8)  # the recurrent layers see past any window
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
        for t in range(7):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 37
            assert not torch.equal(model(changed).logits[:, -1], logits), t


@every_kind
def test_a_batch_gives_what_its_rows_give(kind: str):
    model, ids = make_model(kind), draw_ids(3, 17)
    with torch.no_grad():
        rows = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(model(ids).logits, rows, **CLOSE)


@every_kind
@pytest.mark.parametrize(
    "sizes",
    [[9] + [1] * 11, [1] * 20, [7, 6, 7], [1, 19], [12, 1, 7]],
    ids=["prefill and decode", "decode", "chunks", "one and the rest", "mixed"],
)
def test_pieces_through_a_cache_give_the_whole(kind: str, sizes: list[int]):
    model, ids = make_model(kind), draw_ids(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
    torch.testing.assert_close(read_in_pieces(model, ids, sizes), whole, **CLOSE)
    ones = torch.ones_like(ids)
    pieces = read_in_pieces(model, ids, sizes, attention_mask=ones)
    torch.testing.assert_close(pieces, whole, **CLOSE)


@every_kind
def test_the_cache_counts_tokens_and_keeps_float32_states(kind: str):
    model, ids = make_model(kind), draw_ids(2, 6)
    cache = model(ids, use_cache=True).cache
    assert isinstance(cache, I3Cache)
    assert cache.get_seq_length() == 6
    cache = model(ids[:, :3], cache=cache, use_cache=True).cache
    assert cache.get_seq_length() == 9
    for layer, layer_type in zip(cache.layers, model.config.layer_types, strict=True):
        if layer_type in ("linear_attention", "hybrid"):
            assert layer.recurrent_states[0].dtype == torch.float32
    with pytest.warns(FutureWarning, match="Use `cache` instead"):  # its name before 5.24
        assert model(ids[:, :1], past_key_values=cache).cache is cache
    assert cache.get_seq_length() == 10
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids, cache=cache, use_cache=True)
    torch.testing.assert_close(again.logits, model(ids).logits, **CLOSE)


@every_kind
@pytest.mark.parametrize("sizes", [[16], [9] + [1] * 7, [2, 5, 9]], ids=["whole", "decode", "cut"])
def test_padding_on_the_left_changes_nothing(kind: str, sizes: list[int]):
    model, ids = make_model(kind), draw_ids(3, 16)
    padding = torch.tensor([0, 4, 7])
    mask = (torch.arange(16) >= padding[:, None]).long()
    padded = torch.where(mask.bool(), ids, 0)
    logits = read_in_pieces(model, padded, sizes, attention_mask=mask)
    with torch.no_grad():
        for row, start in enumerate(padding.tolist()):
            alone = model(ids[row : row + 1, start:]).logits
            torch.testing.assert_close(logits[row : row + 1, start:], alone, **CLOSE)


@every_kind
def test_padding_on_the_right_changes_nothing(kind: str):
    model, ids = make_model(kind), draw_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], **CLOSE)
        torch.testing.assert_close(logits[1, :9], model(ids[1:, :9]).logits[0], **CLOSE)


@every_kind
def test_a_saved_model_comes_back_bit_for_bit(kind: str, tmp_path: Path):
    model, ids = make_model(kind), draw_ids(2, 11)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is I3ForCausalLM
    assert loaded.config.to_dict() == {
        **model.config.to_dict(),
        "_name_or_path": str(tmp_path),
        "dtype": loaded.config.to_dict()["dtype"],
    }
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_auto_classes_know_the_architecture(tmp_path: Path):
    model = make_model("rwkv4")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is I3Config
    assert type(AutoModelForCausalLM.from_config(model.config)) is I3ForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is I3Model
    ids = draw_ids(2, 5)
    expected = model.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, expected)


@every_kind
@both_initializations
def test_equal_seeds_build_equal_models_on_any_memory(kind: str, initialization: str):
    # A parameter that nobody initialises keeps what its memory held: fill that with rubbish.
    builds = []
    for rubbish in (1e6, -3e7):
        for size in (1, 5, 12, 25, 37, 48, 60, 144, 444, 576):
            torch.full((size,), rubbish)
        torch.manual_seed(5)
        builds.append(I3ForCausalLM(make_config(kind, initialization=initialization)))
    one, other = (dict(build.named_parameters()) for build in builds)
    for name, parameter in one.items():
        assert torch.equal(parameter, other[name]), name
        assert float(parameter.detach().abs().max()) < 10, name


@every_kind
@both_initializations
def test_every_parameter_is_drawn_even_from_a_nan(
    kind: str, initialization: str, monkeypatch: pytest.MonkeyPatch
):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    model = I3ForCausalLM(make_config(kind, initialization=initialization))
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name


def layers_of(model: I3ForCausalLM, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.fixture(scope="module")
def wide_models() -> dict[tuple[str, str], I3ForCausalLM]:
    """Models wide enough for statistics: 128 channels."""
    models = {}
    for recurrence in ("rwkv4", "state_space"):
        for initialization in ("original", "rwkv"):
            torch.manual_seed(0)
            config = I3Config(
                vocab_size=300,
                hidden_size=128,
                layer_types="3 x linear_attention, full_attention",
                recurrence=recurrence,
                state_size=64,
                num_attention_heads=4,
                initialization=initialization,
                initializer_range=0.03,
            )
            models[recurrence, initialization] = I3ForCausalLM(config)
    return models


def assert_normal(parameter: Tensor, std: float):
    """Checks deviation and mean of at least 8,192 normal draws, known to 1 in 100."""
    assert parameter.numel() >= 8192
    values = parameter.detach()
    assert float(values.std()) == pytest.approx(std, rel=0.05)
    assert float(values.mean()) == pytest.approx(0, abs=0.05 * std)


@pytest.mark.parametrize("recurrence", ["rwkv4", "state_space"])
@both_initializations
def test_embeddings_head_and_norms_of_both_schemes(
    wide_models, recurrence: str, initialization: str
):
    model = wide_models[recurrence, initialization]
    for matrix in (model.model.embed_tokens, model.model.embed_positions, model.lm_head):
        assert_normal(matrix.weight, 0.03)
    assert not model.lm_head.bias.any()
    for norm in layers_of(model, torch.nn.LayerNorm):
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()
    for linear in layers_of(model, torch.nn.Linear):
        assert linear.bias is None or not linear.bias.any()


def test_original_scheme_of_rwkv_layers(wide_models):
    model = wide_models["rwkv4", "original"]
    mixes = layers_of(model, TimeMix)
    assert len(mixes) == 3
    for mix in mixes:
        for shift in (mix.time_mix_key, mix.time_mix_value, mix.time_mix_receptance):
            assert bool((shift == 1).all())
        assert bool((mix.time_first == 1).all())
        for matrix in (mix.key, mix.value, mix.receptance, mix.output):
            assert_normal(matrix.weight, 0.03)
    for mix in layers_of(model, ChannelMix):
        assert bool((mix.time_mix_key == 1).all())
        assert bool((mix.time_mix_receptance == 1).all())
        for matrix in (mix.key, mix.value, mix.receptance):
            assert_normal(matrix.weight, 0.03)
    decays = torch.cat([mix.time_decay.detach() for mix in mixes])
    assert float(decays.min()) >= -6
    assert float(decays.max()) <= -3
    # 384 uniform draws on an interval of length 3: the mean is known to 0.044.
    assert float(decays.mean()) == pytest.approx(-4.5, abs=0.2)
    assert float(decays.std()) == pytest.approx(3 / math.sqrt(12), rel=0.15)


def test_original_scheme_of_hybrid_layers(wide_models):
    mixers = layers_of(wide_models["state_space", "original"], HybridMixer)
    assert len(mixers) == 3
    for mixer in mixers:
        assert bool((mixer.mix == 0.5).all())
        assert bool((mixer.D == 0.1).all())
        for matrix in (mixer.B, mixer.C):
            assert_normal(matrix, 0.01)
        # 4,096 draws: the deviation is known to 1 in 90.
        assert float(mixer.A.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_rwkv_scheme_of_rwkv_layers(wide_models):
    model, C = wide_models["rwkv4", "rwkv"], 128
    channels = range(C)
    for layer, mix in enumerate(layers_of(model, TimeMix)):
        depth, remaining = layer / 3, 1 - layer / 4
        expected = {
            "time_decay": [-5 + 8 * (c / (C - 1)) ** (0.7 + 1.3 * depth) for c in channels],
            # RWKV-LM: log 0.3 + 0.5 * ((c + 1) % 3 - 1), with the family's opposite sign.
            "time_first": [-math.log(0.3) - 0.5 * ((c + 1) % 3 - 1) for c in channels],
            "time_mix_key": [(c / C) ** remaining for c in channels],
            "time_mix_value": [(c / C) ** remaining + 0.3 * depth for c in channels],
            "time_mix_receptance": [(c / C) ** (0.5 * remaining) for c in channels],
        }
        for name, values in expected.items():
            # float32 powers.
            torch.testing.assert_close(
                getattr(mix, name).detach(), torch.tensor(values), rtol=1e-5, atol=1e-5
            )
        for zero in (mix.key, mix.receptance, mix.output):
            assert not zero.weight.any()
        assert_normal(mix.value.weight, 0.03)
    for layer, mix in enumerate(layers_of(model, ChannelMix)):
        values = torch.tensor([(c / C) ** (1 - layer / 4) for c in channels])
        for shift in (mix.time_mix_key, mix.time_mix_receptance):
            torch.testing.assert_close(shift.detach(), values, rtol=1e-5, atol=1e-5)
        assert not mix.value.weight.any()
        assert not mix.receptance.weight.any()
        assert_normal(mix.key.weight, 0.03)


def test_rwkv_scheme_of_the_other_layers(wide_models):
    model, C = wide_models["state_space", "rwkv"], 128
    for layer, mixer in enumerate(layers_of(model, HybridMixer)):
        rates = [-5 + 8 * (c / (C - 1)) ** (0.7 + 1.3 * layer / 3) for c in range(C)]
        averages = torch.exp(-torch.exp(torch.tensor(rates)))
        # float32 powers.
        torch.testing.assert_close(mixer.mix.detach(), averages, rtol=1e-4, atol=1e-6)
    for attention in layers_of(model, CausalSelfAttention):
        assert not attention.output.weight.any()
        assert_normal(attention.query_key_value.weight, 0.03)
    for network in layers_of(model, FeedForward):
        assert not network.down.weight.any()
        assert_normal(network.up.weight, 0.03)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if KINDS[kind].get("recurrence", "rwkv4") == "rwkv4"]
)
def test_rwkv_scheme_begins_as_the_identity(kind: str):
    torch.manual_seed(3)
    model = I3ForCausalLM(make_config(kind, initialization="rwkv")).eval()
    ids = draw_ids(2, 9)
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids)
        if kind in LIMITED:
            embedded += model.model.embed_positions.weight[:9]
        expected = model.lm_head(model.model.norm(embedded))
        # Zeros were added: equal to the last bit.
        assert torch.equal(model(ids).logits, expected)


@every_kind
def test_gradient_checkpointing_gives_equal_gradients(kind: str):
    plain, ids = make_model(kind).train(), draw_ids(2, 14)
    checkpointed = copy.deepcopy(plain)
    # The name in newer versions of transformers, then the older one, which they deprecate.
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)
    enable = enable or checkpointed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    losses = []
    for model in (plain, checkpointed):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        # The same arithmetic twice.
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-7, msg=name)


@every_kind
def test_labels_give_the_loss_of_the_next_token(kind: str):
    model, ids = make_model(kind), draw_ids(2, 12)
    labels = ids.clone()
    labels[0, 5:8] = -100
    output = model(ids, labels=labels)
    log_probs = output.logits[:, :-1].log_softmax(dim=-1)
    nats = -log_probs.gather(2, ids[:, 1:, None])[..., 0]
    expected = nats[labels[:, 1:] != -100].mean()
    # A mean of about twenty float32 numbers.
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


def test_logits_can_be_limited_to_the_last_positions():
    model, ids = make_model("rwkv4"), draw_ids(2, 12)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:], **CLOSE)
    some = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole[:, some], **CLOSE)


def test_embeddings_may_stand_in_for_ids():
    model, ids = make_model("rwkv4"), draw_ids(2, 12)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    message = r"^give exactly one of input_ids and inputs_embeds$"
    with pytest.raises(ValueError, match=message):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match=message):
        model()


def test_hidden_states_of_all_layers_can_be_had():
    model, ids = make_model("rwkv4"), draw_ids(2, 5)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert all(states.shape == (2, 5, 12) for states in output.hidden_states)


@pytest.mark.parametrize("bad", [37, 1000, -1])
def test_an_id_outside_the_vocabulary_is_refused(bad: int):
    ids = draw_ids(2, 5)
    ids[1, 2] = bad
    with pytest.raises(
        ValueError, match=rf"^token id {bad} is outside the vocabulary: ids run from 0 to 36;"
    ):
        make_model("rwkv4")(ids)


@pytest.mark.parametrize("kind", LIMITED)
def test_more_tokens_than_positions_are_refused(kind: str):
    model = make_model(kind)
    assert model(draw_ids(1, 24)).logits.shape == (1, 24, 37)
    message = r"^25 tokens are more than max_position_embeddings \(24\) allows"
    with pytest.raises(ValueError, match=message):
        model(draw_ids(1, 25))
    with pytest.raises(ValueError, match=message):
        model(draw_ids(1, 25), attention_mask=torch.ones(1, 25))
    cache = model(draw_ids(1, 24), use_cache=True).cache
    with pytest.raises(ValueError, match=message):
        model(draw_ids(1, 1), cache=cache)


@every_kind
def test_padding_takes_no_position(kind: str):
    model, ids = make_model(kind), draw_ids(1, 24)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(30) >= 6).long()[None]
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits[:, 6:]
        torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


def test_tied_embeddings_are_one_parameter(tmp_path: Path):
    tied, untied = make_model("rwkv4", tie_word_embeddings=True), make_model("rwkv4")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 37 * 12
    tied.save_pretrained(tmp_path)
    loaded = I3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = draw_ids(2, 9)
    assert torch.equal(loaded(ids).logits, tied(ids).logits)


@every_kind
def test_bfloat16_keeps_exponents_in_float32(kind: str, tmp_path: Path):
    model, ids = make_model(kind), draw_ids(2, 16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    original = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if name.endswith(("time_decay", "time_first")):
            assert torch.equal(parameter, original[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    with torch.no_grad():
        logits = loaded(ids).logits
        assert logits.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits, and three layers add up their roundings.
        difference = (logits.float() - model(ids).logits).norm() / model(ids).logits.norm()
        assert float(difference) < 0.03
        sizes = [9] + [1] * 7
        torch.testing.assert_close(read_in_pieces(loaded, ids, sizes), logits, rtol=0.1, atol=0.1)


@every_kind
def test_training_under_autocast_gives_finite_float32_gradients(kind: str):
    model, ids = make_model(kind).train(), draw_ids(2, 14)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.isfinite().all()), name


def test_training_makes_no_cache():
    model, ids = make_model("rwkv4").train(), draw_ids(2, 5)
    assert model(ids).cache is None
    assert model.eval()(ids).cache is not None
    assert model(ids, use_cache=False).cache is None


def band(T: int, window: int, padding: Tensor) -> Tensor:
    """What each token may see: the last `window` real ones, bool, (B, 1, T, T)."""
    query, key = torch.arange(T)[:, None], torch.arange(T)
    near = (key <= query) & (key > query - window)
    # Padding has to see something, and nobody looks at what it sees.
    return (near & (key >= padding[:, None, None, None])) | torch.eye(T, dtype=torch.bool)


@pytest.mark.parametrize("window", [2, 5, 14, 40])
@pytest.mark.parametrize("padding", [(0, 0), (0, 6)], ids=["whole", "padded"])
@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_sliding_attention_trains_as_full_attention_with_a_band(
    window: int, padding: tuple[int, int], position: str
):
    kind, ids, starts = "all attention", draw_ids(2, 14), torch.tensor(padding)
    full = make_model(kind, position_embedding_type=position).double().train()
    sliding = I3ForCausalLM(
        make_config(
            kind,
            layer_types="2 x sliding_attention",
            sliding_window=window,
            position_embedding_type=position,
        )
    )
    sliding.double().train().load_state_dict(full.state_dict())
    mask = (torch.arange(14) >= starts[:, None]).long()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, : starts.max() + 1] = -100
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = full(
        ids, attention_mask=band(14, window, starts), position_ids=positions, labels=labels
    )
    output = sliding(ids, attention_mask=mask if max(padding) else None, labels=labels)
    # The same sums in float64.
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(output.logits[mask.bool()], expected.logits[mask.bool()], **exact)
    expected.loss.backward()
    output.loss.backward()
    for (name, one), other in zip(sliding.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **exact, msg=name)


@pytest.mark.parametrize("kind", UNLIMITED)
def test_texts_may_be_longer_than_what_the_model_is_made_for(kind: str):
    model, ids = make_model(kind), draw_ids(2, 60)
    with torch.no_grad():
        whole = model(ids).logits
    torch.testing.assert_close(read_in_pieces(model, ids, [31] + [1] * 29), whole, **CLOSE)


@pytest.mark.parametrize("kind", ["sliding", "sliding rope", "sliding none"])
def test_a_sliding_layer_keeps_no_more_keys_than_its_window_shows(kind: str):
    model, ids = make_model(kind), draw_ids(1, 20)
    cache = model(ids, use_cache=True).cache
    for _ in range(3):
        for layer, layer_type in zip(cache.layers, model.config.layer_types, strict=True):
            if layer_type == "sliding_attention":
                assert layer.keys.shape[2] == layer.values.shape[2] == 4  # and the next is 5
        model(ids[:, :1], cache=cache)
    assert cache.get_seq_length() == 23


@pytest.mark.parametrize("kind", ["sliding rope", "sliding none", "all rwkv4 none"])
def test_thousands_of_tokens_decode_as_one_pass_reads_them(kind: str):
    model, ids = make_model(kind), draw_ids(1, 3000)
    with torch.no_grad():
        for mixer in layers_of(model, HybridMixer):
            mixer.mix.clamp_(0, 0.99)  # a running average above 1 grows without bound
        whole = model(ids).logits
    decoded = read_in_pieces(model, ids, [1] * 3000)
    # The states of 3,000 steps, summed in another order.
    torch.testing.assert_close(decoded, whole, **CLOSE)
