from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerState

from i3lm.models.i3 import I3Config, I3ForCausalLM
from i3lm.training.guards import SpectralRadiusWatch, find_non_finite, spectral_radius
from i3lm.training.optimizers import leave_gradients_small

IDS = torch.arange(12).view(2, 6)


def make_model(**fields: object) -> I3ForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2}
    return I3ForCausalLM(I3Config(**shape, **{"layer_types": ["linear_attention"] * 2, **fields}))


def find(model: I3ForCausalLM, factor: float = 1.0) -> str:
    def loss_of(batch: Tensor) -> Tensor:
        return factor * model(input_ids=batch, labels=batch, use_cache=False).loss

    return find_non_finite(model, [IDS, IDS + 1], loss_of)


def spoil_weight(model: I3ForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[1].feed_forward.key.weight[3, 4] = math.inf


def spoil_output(model: I3ForCausalLM) -> None:
    # A tuple, as (output, state), of which only the second batch's state goes wrong.
    def forget(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        return output[0], torch.full((2,), math.nan if 12 in seen[-1] else 0.0)

    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.model.layers[1].mixer.register_forward_hook(forget)
    model.model.layers[1]._recur = lambda x, mask, cache: model.model.layers[1].mixer(x)[0]


def spoil_gradient(model: I3ForCausalLM) -> None:
    layer = model.model.layers[0].feed_forward_norm
    layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * math.nan,))


SPOILS: dict[str, tuple[Callable[[I3ForCausalLM], None], str]] = {
    "weight": (
        spoil_weight,
        "the weight model.layers.1.feed_forward.key.weight is not finite already",
    ),
    "output": (
        spoil_output,
        "model.layers.1.mixer (TimeMix) gives the first output that is not finite",
    ),
    "gradient": (
        spoil_gradient,
        "the gradient of model.layers.0.mixer.output.weight is the first that is not finite",
    ),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("spoil", SPOILS)
def test_where_a_number_goes_wrong(spoil: str, small: bool):
    model = make_model()
    if small:
        leave_gradients_small(model)
    spoil_it, expected = SPOILS[spoil]
    spoil_it(model)
    assert find(model) == expected


def test_a_sparse_gradient_is_looked_at():
    model = make_model()
    leave_gradients_small(model)
    model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * math.inf)
    assert (
        find(model) == "the gradient of model.embed_tokens.weight is the first that is not finite"
    )


def test_the_loss_itself_and_nothing_at_all():
    assert find(make_model()).startswith("going through the step again, every number is finite")
    found = find(make_model(), factor=math.inf)
    assert found == "the gradient of lm_head.bias is the first that is not finite"


def test_hooks_are_gone_afterwards():
    model = make_model()
    find(model)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_spectral_radius_by_hand():
    assert spectral_radius(make_model()) is None
    model = make_model(recurrence="state_space", state_size=3)
    A = [layer.mixer.A for layer in model.model.layers]
    with torch.no_grad():
        A[0].copy_(torch.diag(torch.tensor([0.5, -0.9, 0.1])))
        # A rotation by a right angle, scaled: its eigenvalues are 0.8i and -0.8i.
        A[1].copy_(torch.tensor([[0.0, -0.8, 0.0], [0.8, 0.0, 0.0], [0.0, 0.0, 0.2]]))
    assert spectral_radius(model) == pytest.approx(0.9)
    with torch.no_grad():
        A[1].mul_(2)
    assert spectral_radius(model) == pytest.approx(1.6)

    said: list[str] = []
    watch = SpectralRadiusWatch(said.append)
    for step in (7, 8):
        logs = {"loss": 1.0}
        watch.on_log(None, TrainerState(global_step=step), None, logs=logs, model=model)
        assert logs["spectral_radius"] == pytest.approx(1.6)
    assert len(said) == 1
    assert said[0].startswith("warning: step 7: the spectral radius of a state transition A is 1.6")
    with torch.no_grad():
        A[0][0, 0] = math.nan
    assert spectral_radius(model) == math.inf
