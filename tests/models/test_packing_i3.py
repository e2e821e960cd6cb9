"""Documents packed into rows, and rows that continue one another."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from i3lm.errors import CheckpointError
from i3lm.layers import CausalSelfAttention, ChannelMix
from i3lm.layers.time_mix import TimeMixState
from i3lm.models.i3 import CarriedState, I3ForCausalLM
from i3lm.ops.dispatch import use_implementation
from tests.models.tiny_i3 import KINDS, LIMITED, draw_ids, make_model

# The same sums in float64, in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-10}

every_kind = pytest.mark.parametrize("kind", KINDS)
ALL_RECURRENT = ["all rwkv4", "all state_space", "all rwkv4 none"]


def mark_starts(*rows: list[int]) -> Tensor:
    """True at the first token of each document, given their lengths row by row, (B, T)."""
    reset = torch.zeros(len(rows), sum(rows[0]), dtype=torch.bool)
    for b, lengths in enumerate(rows):
        reset[b, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    return reset


def documents_of(row: Tensor, reset: Tensor) -> list[Tensor]:
    """The pieces of a row (T,) that begin at its marks."""
    cuts = [0, *(reset[1:].nonzero()[:, 0] + 1).tolist(), len(row)]
    return [row[start:stop] for start, stop in pairwise(cuts)]


def log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """Of every token but the first, given those before it: (B, T - 1)."""
    return logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]


def gradients(model: I3ForCausalLM, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters()), materialize_grads=True))


def assert_same_gradients(model: I3ForCausalLM, got: list[Tensor], expected: list[Tensor]) -> None:
    for (name, _), one, other in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


@st.composite
def two_rows_of_lengths(draw: st.DrawFn) -> list[list[int]]:
    """Two rows of documents of 1 to 20 tokens, both of 20 tokens."""
    rows = []
    for _ in range(2):
        lengths = []
        while sum(lengths) < 20:
            lengths.append(draw(st.integers(1, 20 - sum(lengths))))
        rows.append(lengths)
    return rows


def check_packed_against_alone(model: I3ForCausalLM, ids: Tensor, reset: Tensor, **marks: Any):
    """Logits, likelihoods and gradients of packed rows are those of each document alone."""
    packed = model(ids, reset=reset, **marks)
    total, alone_total = 0.0, 0.0
    for b in range(len(ids)):
        logits = documents_of(packed.logits[b], reset[b])
        for document, got in zip(documents_of(ids[b], reset[b]), logits, strict=True):
            alone = model(document[None]).logits
            torch.testing.assert_close(got[None], alone, **EXACT)
            total = total + log_likelihoods(got[None], document[None]).sum() + got[-1, 0]
            alone_total = alone_total + log_likelihoods(alone, document[None]).sum()
            alone_total = alone_total + alone[0, -1, 0]  # of documents of one token too
    torch.testing.assert_close(total, alone_total, **EXACT)
    assert_same_gradients(model, gradients(model, total), gradients(model, alone_total))


@every_kind
@settings(max_examples=8, deadline=None, derandomize=True)
@given(rows=two_rows_of_lengths())
def test_a_packed_document_is_what_it_is_alone(kind: str, rows: list[list[int]]):
    model = make_model(kind).double().train()
    check_packed_against_alone(model, draw_ids(2, 20), mark_starts(*rows))


@pytest.mark.parametrize("implementation", ["tiles", "torch"])
@pytest.mark.parametrize("kind", ["rwkv4", "sliding rope"])
def test_every_form_of_attention_keeps_documents_apart(kind: str, implementation: str):
    model = make_model(kind).double().train()
    with use_implementation(packed_attention=implementation):
        check_packed_against_alone(model, draw_ids(2, 12), mark_starts([5, 7], [1, 3, 8]))


@every_kind
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_packed_rows_may_be_padded(kind: str, side: str):
    model, ids = make_model(kind).double(), draw_ids(2, 20)
    reset = mark_starts([4, 9, 7], [4, 5, 11])
    attention_mask = torch.ones_like(ids)
    packed = {"left": slice(4, 20), "right": slice(0, 13), "none": slice(0, 20)}[side]
    if side != "none":
        attention_mask[0] = 0
        attention_mask[0, packed] = 1
    reset &= attention_mask.bool()
    with torch.no_grad():
        padded = model(ids, reset=reset, attention_mask=attention_mask).logits
        alone = model(ids[:1, packed], reset=reset[:1, packed]).logits
        torch.testing.assert_close(padded[:1, packed], alone, **EXACT)
        whole = model(ids[1:], reset=reset[1:]).logits
        torch.testing.assert_close(padded[1:], whole, **EXACT)


@pytest.mark.parametrize("kind", LIMITED)
def test_rows_may_be_longer_than_the_context_where_documents_are_not(kind: str):
    model, ids = make_model(kind).double(), draw_ids(1, 40)
    with torch.no_grad():
        packed = model(ids, reset=mark_starts([24, 16])).logits
        torch.testing.assert_close(packed[:, :24], model(ids[:, :24]).logits, **EXACT)
    with pytest.raises(ValueError, match=r"^25 tokens are more than max_position_embeddings"):
        model(ids, reset=mark_starts([15, 25]))


@every_kind
def test_without_a_mark_inside_a_packed_row_is_a_plain_one(kind: str):
    model, ids = make_model(kind).double(), draw_ids(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for reset in (mark_starts([20], [20]), torch.zeros(2, 20, dtype=torch.bool)):
            output = model(ids, reset=reset)
            torch.testing.assert_close(output.logits, expected, **EXACT)
            assert output.cache is None


@every_kind
def test_packed_training_under_autocast_and_checkpointing(kind: str):
    plain, ids = make_model(kind).train(), draw_ids(2, 20)
    checkpointed = with_checkpointing(plain)
    reset, losses = mark_starts([4, 9, 7], [1, 1, 18]), []
    for model in (plain, checkpointed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, reset=reset).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert bool(one.grad.isfinite().all()), name
        assert torch.equal(one.grad, other.grad), name


def with_checkpointing(model: I3ForCausalLM) -> I3ForCausalLM:
    """A copy that computes its layers again in the backward pass."""
    checkpointed = copy.deepcopy(model)
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)
    enable = enable or checkpointed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return checkpointed


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.bool), r"^reset \(torch.bool, \(2, 5\)\) must be torch.boo"),
        (torch.zeros(2, 6).long(), r"^reset \(torch.int64, \(2, 6\)\) must be torch.bool of .*6\)"),
    ],
)
def test_a_reset_that_does_not_fit_is_refused(reset: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        make_model("rwkv4")(draw_ids(2, 6), reset=reset)


def test_reset_at_padding_or_with_other_masks_is_refused():
    model, ids, reset = make_model("rwkv4"), draw_ids(1, 6), mark_starts([2, 4])
    with pytest.raises(ValueError, match=r"^reset marks padding: mark the first real token"):
        model(ids, reset=reset, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 6, 6\) must have .* \(1, 6\)"):
        model(ids, reset=reset, attention_mask=torch.ones(1, 1, 6, 6).bool())


@pytest.mark.parametrize("name", ["reset", "carried_state"])
def test_rows_do_not_go_with_a_cache(name: str):
    model, ids = make_model("rwkv4"), draw_ids(1, 6)
    cache = model(ids, use_cache=True).cache
    value = {"reset": mark_starts([6]), "carried_state": CarriedState(model.config)}[name]
    with pytest.raises(ValueError, match=r"^reset and carried_state are for whole rows"):
        model(ids, cache=cache, **{name: value})


# Streams


def read_stream(model: I3ForCausalLM, rows: list[Tensor], **marks: list[Tensor]) -> list[Tensor]:
    """The logits of rows that continue one another."""
    carried, logits = CarriedState(model.config), []
    for n, row in enumerate(rows):
        given = {name: mark[n] for name, mark in marks.items()}
        logits.append(model(row, carried_state=carried, **given).logits)
        carried.advance()
    return logits


@pytest.mark.parametrize("kind", ALL_RECURRENT)
@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [1, 12, 7], [20]])
@pytest.mark.parametrize("marked", [False, True], ids=["one document", "documents"])
def test_rows_of_a_recurrent_model_are_one_long_row(kind: str, sizes: list[int], marked: bool):
    # Learned positions would begin anew in every row.
    model, ids = make_model(kind, position_embedding_type="none").double().train(), draw_ids(3, 20)
    reset = mark_starts([9, 11], [1, 4, 15], [20])
    reset[2, 0] = False
    marks = {"reset": list(reset.split(sizes, dim=1))} if marked else {}
    whole = model(ids, reset=reset if marked else None).logits
    rows = read_stream(model, list(ids.split(sizes, dim=1)), **marks)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, **EXACT)


def truncated_by_hand(model: I3ForCausalLM, rows: list[Tensor]) -> list[Tensor]:
    """The logits of rows where every layer is called with its last state, detached."""
    kept: dict[str, Any] = {}

    def recur(name: str, module: nn.Module, x: Tensor) -> Tensor:
        output, state = module(x, kept.get(name))
        whole = isinstance(state, Tensor)
        kept[name] = state.detach() if whole else TimeMixState(*(part.detach() for part in state))
        return output

    def attend(module: nn.Module, x: Tensor, window: int | None) -> Tensor:
        T = x.shape[1]
        sees = torch.ones(T, T, dtype=torch.bool).tril()
        rotation = None
        if model.config.position_embedding_type == "rope":
            rotation = model.model.rotary_embedding(torch.arange(T)[None], torch.float64)
        return module(x, sees if window is None else sees.triu(1 - window), rotation=rotation)

    def read(row: Tensor) -> Tensor:
        x = model.model.embed_tokens(row)
        if model.config.position_embedding_type == "learned":
            x = x + model.model.embed_positions.weight[: row.shape[1]]
        for n, layer in enumerate(model.model.layers):
            if isinstance(layer.mixer, CausalSelfAttention):
                slides = layer.layer_type == "sliding_attention"
                window = model.config.sliding_window if slides else None
                x = x + attend(layer.mixer, layer.mixer_norm(x), window)
            else:
                x = x + recur(f"mixer {n}", layer.mixer, layer.mixer_norm(x))
            if layer.layer_type == "hybrid":
                x = x + attend(layer.attention, layer.attention_norm(x), None)
            feed = layer.feed_forward
            if isinstance(feed, ChannelMix):
                feed = partial(recur, f"feed_forward {n}", feed)
            x = x + feed(layer.feed_forward_norm(x))
        return model.lm_head(model.model.norm(x))

    return [read(row) for row in rows]


@every_kind
def test_gradients_of_a_stream_are_those_of_truncated_back_propagation(kind: str):
    model, ids = make_model(kind).double().train(), draw_ids(3, 21)
    rows = list(ids.split(7, dim=1))
    expected = truncated_by_hand(model, rows)
    got = read_stream(model, rows)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    totals = [
        sum(log_likelihoods(part, row).sum() for part, row in zip(parts, rows, strict=True))
        for parts in (got, expected)
    ]
    assert_same_gradients(model, *(gradients(model, total) for total in totals))


@pytest.mark.parametrize("kind", ALL_RECURRENT)
def test_no_gradient_flows_into_the_row_before(kind: str):
    model, ids = make_model(kind).double().train(), draw_ids(2, 10)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    carried = CarriedState(model.config)
    model(inputs_embeds=embedded[:, :5], carried_state=carried)
    carried.advance()
    logits = model(inputs_embeds=embedded[:, 5:], carried_state=carried).logits
    (grad,) = torch.autograd.grad(logits.sum(), embedded)
    assert not grad[:, :5].any()
    assert bool(grad[:, 5:].any())


@every_kind
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("early", [False, True], ids=["advance after", "advance before backward"])
def test_a_checkpointed_stream_is_bit_for_bit_the_plain_one(kind: str, precision: str, early: bool):
    plain, ids = make_model(kind).train(), draw_ids(2, 30)
    checkpointed = with_checkpointing(plain)
    resets = list(mark_starts([4, 9, 17], [13, 16, 1]).split(10, dim=1))
    trained = {}
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        carried, results = CarriedState(model.config), []
        for row, reset in zip(ids.split(10, dim=1), resets, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                output = model(row, labels=row, reset=reset, carried_state=carried)
            if early and model is checkpointed:
                carried.advance()  # what is computed again must not read the new states
            output.loss.backward()
            if not (early and model is checkpointed):
                carried.advance()
            results.append(output.loss.detach())
        trained[name] = [*results, *carried.state_dict().values()]
        trained[name] += [parameter.grad for parameter in model.parameters()]
    for one, other in zip(*trained.values(), strict=True):
        assert torch.equal(one, other)


def test_a_forward_pass_may_be_repeated_until_the_states_advance():
    model, ids = make_model("rwkv4"), draw_ids(2, 18)
    carried = CarriedState(model.config)
    first = model(ids[:, :6], carried_state=carried).logits
    assert carried.state_dict() == {}
    assert torch.equal(model(ids[:, :6], carried_state=carried).logits, first)
    carried.advance()
    carried.advance()  # nothing new was written
    second = model(ids[:, 6:12], carried_state=carried).logits
    assert torch.equal(model(ids[:, 6:12], carried_state=carried).logits, second)
    assert not torch.equal(model(ids[:, 6:12], use_cache=False).logits, second)


@pytest.mark.parametrize("kind", ["rwkv4", "v1", "hybrid rwkv4", "all attention"])
def test_saved_states_go_on_bit_for_bit(kind: str, tmp_path):
    model, ids = make_model(kind).train(), draw_ids(2, 12)
    carried = CarriedState(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :6], carried_state=carried)
        carried.advance()
        torch.save(carried.state_dict(), tmp_path / "states")
        expected = model(ids[:, 6:], carried_state=carried).logits
        again = CarriedState(model.config)
        again.load_state_dict(torch.load(tmp_path / "states", weights_only=True))
        assert torch.equal(model(ids[:, 6:], carried_state=again).logits, expected)


def test_states_are_small_and_float32_sums():
    model, ids = make_model("rwkv4").train(), draw_ids(2, 20)
    carried = CarriedState(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, carried_state=carried)
    carried.advance()
    states = carried.state_dict()
    assert sorted(states) == [
        f"{layer}.{slot}"
        for layer in (0, 1)
        for slot in ("feed_forward_shift", "mixer_shift", "recurrence")
    ]
    for name, state in states.items():
        assert state.untyped_storage().nbytes() == state.nbytes, name  # not a view of a row
        assert not state.requires_grad, name
    assert states["0.recurrence"].dtype == torch.float32


def test_another_number_of_rows_is_refused():
    model, ids = make_model("rwkv4"), draw_ids(3, 6)
    carried = CarriedState(model.config)
    model(ids, carried_state=carried)
    carried.advance()
    with pytest.raises(ValueError, match=r"^the carried state is of 3 rows and the batch has 2: "):
        model(ids[:2], carried_state=carried)


def test_states_of_another_model_are_refused():
    states = {}
    for kind, changes in (("rwkv4", {}), ("state_space", {}), ("rwkv4 wide", {"hidden_size": 24})):
        model = make_model(kind.split()[0], **changes)
        carried = CarriedState(model.config)
        model(draw_ids(2, 4), carried_state=carried)
        carried.advance()
        states[kind] = carried.state_dict()
    carried = CarriedState(make_model("rwkv4").config)
    message = r"^carried states \(0.recurrence, 1.recurrence\) are of another model: this one's"
    with pytest.raises(CheckpointError, match=message):
        carried.load_state_dict(states["state_space"])
    with pytest.raises(CheckpointError, match=r"\(2, 3, 24\) is of another .*\('rows', 3, 12\)"):
        carried.load_state_dict(states["rwkv4 wide"])
    carried.load_state_dict(states["rwkv4"])
    carried.load_state_dict({})  # from before the first row
    assert carried.state_dict() == {}


def test_states_move_in_place():
    model = make_model("rwkv4")
    carried = CarriedState(model.config)
    model(draw_ids(2, 4), carried_state=carried)
    carried.advance()
    assert carried.to("meta") is carried
    assert all(state.device.type == "meta" for state in carried.state_dict().values())
