"""Keys and values that grow in place are those that transformers' own layers would keep."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from i3lm.models.i3.cache_i3 import (
    GrowingHybridKeys,
    GrowingKeys,
    GrowingSlidingKeys,
    I3Cache,
)
from tests.models.tiny_i3 import make_config

H, D = 2, 3
PAIRS: dict[str, tuple[Callable[[], DynamicLayer], Callable[[], GrowingKeys]]] = {
    "full": (DynamicLayer, GrowingKeys),
    "sliding": (lambda: DynamicSlidingWindowLayer(5), lambda: GrowingSlidingKeys(5)),
    "hybrid": (LinearAttentionAndFullAttentionLayer, GrowingHybridKeys),
}
every_kind = pytest.mark.parametrize("kind", PAIRS)


def draw(B: int, T: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, H, T, D), torch.randn(B, H, T, D)


def torch_copy(layer: GrowingKeys) -> GrowingKeys:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ACTIONS = {
    "append 1": None,
    "append 3": None,
    "append 70": None,  # more than there is room for
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0, 1])),
    "reset": lambda layer: layer.reset(),
}


@every_kind
@settings(max_examples=60, deadline=None, derandomize=True)
@given(actions=st.lists(st.sampled_from(list(ACTIONS)), max_size=12), seed=st.integers(0, 99))
def test_it_keeps_what_a_dynamic_layer_keeps(kind: str, actions: list[str], seed: int):
    torch.manual_seed(seed)
    expected, layer = (make() for make in PAIRS[kind])
    B = 2
    for action in ["append 3", *actions]:
        if action.startswith("append"):
            new = draw(B, int(action.split()[1]))
            torch.testing.assert_close(layer.update(*new), expected.update(*new), rtol=0, atol=0)
        elif layer.get_seq_length():
            ACTIONS[action](layer)
            ACTIONS[action](expected)
        if action == "reset":
            B = 2
        elif layer.is_initialized:
            B = len(layer.keys)
        assert layer.get_seq_length() == expected.get_seq_length()
        torch.testing.assert_close(
            [layer.keys, layer.values], [expected.keys, expected.values], rtol=0, atol=0
        )


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_cropping(kind: str):
    expected, layer = (make() for make in PAIRS[kind])
    for size, cut in ((3, 1), (2, 2), (1, 0)):
        new = draw(1, size)
        for each in (expected, layer):
            each.update(*new)
            each.crop(-cut)
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=0)
        assert layer.get_seq_length() == expected.get_seq_length()


@every_kind
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), torch_copy]
)
def test_a_copy_goes_its_own_way(kind: str, copied: Callable[[GrowingKeys], GrowingKeys]):
    layer = PAIRS[kind][1]()
    layer.update(*draw(1, 4))
    twin = copied(layer)
    ours, theirs = draw(1, 2), draw(1, 2)
    kept = layer.update(*ours)
    other = twin.update(*theirs)
    torch.testing.assert_close(kept[0][:, :, :4], other[0][:, :, :4], rtol=0, atol=0)
    torch.testing.assert_close(kept[0][:, :, 4:], ours[0], rtol=0, atol=0)
    torch.testing.assert_close(other[1][:, :, 4:], theirs[1], rtol=0, atol=0)


def test_tensors_lent_to_another_layer_are_not_written_over():
    layer, other = GrowingKeys(), GrowingKeys()
    layer.update(*draw(1, 4))
    other.update(*draw(1, 4))
    other.keys, other.values = layer.keys, layer.values
    ours, theirs = draw(1, 1), draw(1, 1)
    layer.update(*ours)
    other.update(*theirs)
    torch.testing.assert_close(layer.keys[:, :, 4:], ours[0], rtol=0, atol=0)
    torch.testing.assert_close(other.keys[:, :, 4:], theirs[0], rtol=0, atol=0)


def test_tokens_are_added_in_place_and_memory_stays_in_proportion():
    layer, addresses = GrowingKeys(), set()
    for _ in range(2000):
        layer.update(*draw(1, 1))
        addresses.add(layer.keys.data_ptr())
    assert len(addresses) <= 12
    assert layer.keys.untyped_storage().nbytes() <= 1.6 * layer.keys.nbytes


def test_a_window_takes_no_more_memory_for_a_long_text():
    layer = GrowingSlidingKeys(5)
    for _ in range(1000):
        layer.update(*draw(1, 1))
    assert layer.keys.shape[2] == 4
    assert layer.keys.untyped_storage().nbytes() <= 100 * H * D * 4


def test_gradients_pass_as_through_a_dynamic_layer():
    layer, key = GrowingKeys(), torch.randn(1, H, 3, D, requires_grad=True)
    layer.update(key, key)
    keys, _ = layer.update(2 * key, key)
    keys.sum().backward()
    torch.testing.assert_close(key.grad, torch.full_like(key, 3))


def test_what_was_made_in_inference_mode_grows_outside():
    layer = GrowingKeys()
    with torch.inference_mode():
        layer.update(*draw(1, 3))
    with torch.no_grad():
        keys, _ = layer.update(*draw(1, 1))
    assert keys.shape == (1, H, 4, D)


def test_another_number_of_rows_is_refused():
    layer = GrowingKeys()
    layer.update(*draw(1, 3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*draw(2, 1))


def test_a_cache_has_growing_layers():
    layers = I3Cache(make_config("sliding")).layers
    assert [type(layer) for layer in layers[1:]] == [GrowingSlidingKeys, GrowingKeys]
    assert type(I3Cache(make_config("v1")).layers[0]) is GrowingHybridKeys
