"""Whole tiny models under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.fx import GraphModule

from i3lm.models.i3 import CarriedState, I3ForCausalLM
from tests.models.tiny_i3 import draw_ids, make_model

RECURRENCES = {"rwkv4": "i3lm.wkv.default", "state_space": "i3lm.state_space.default"}


@pytest.fixture(autouse=True)
def _no_programs_of_other_tests() -> None:
    """Forgets what was compiled: all models share one entry, which holds only a few programs."""
    torch.compiler.reset()


def loss_and_gradients(model: I3ForCausalLM, call, ids: Tensor) -> list[Tensor]:
    """The loss of a training step, and the gradient of every parameter."""
    model.zero_grad()
    loss = call(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True, use_cache=False)
    loss.loss.backward()
    return [loss.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# PyTorch's tracer warns about its own handling of autograd functions.
own_warning = pytest.mark.filterwarnings(
    "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
)


def check_training(kind: str, backend: str) -> None:
    model, ids = make_model(kind).train(), draw_ids(2, 10)
    expected = loss_and_gradients(model, model, ids)
    expected = [x.clone() for x in expected]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = loss_and_gradients(model, compiled, ids)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@own_warning
@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_compiled_training_step_is_the_eager_one(kind: str):
    check_training(kind, "aot_eager")


@own_warning
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is depre:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_training_step_compiled_to_machine_code_is_the_eager_one(kind: str):
    check_training(kind, "inductor")


@own_warning
@pytest.mark.parametrize("kind", ["rwkv4", "v1", "sliding rope"])
def test_a_compiled_model_keeps_documents_apart(kind: str):
    model, ids = make_model(kind).train(), draw_ids(2, 10)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[:, [0, 3]] = True
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(ids, labels=ids, reset=reset).loss
    torch.testing.assert_close(compiled(ids, labels=ids, reset=reset).loss, expected)


@own_warning
@pytest.mark.parametrize("kind", ["rwkv4", "v1"])
def test_a_compiled_model_reads_a_stream_in_two_programs(kind: str):
    model, ids = make_model(kind).train(), draw_ids(2, 50)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = []
    for call in (model, compiled):
        carried = CarriedState(model.config)
        losses.append([])
        for row in ids.split(10, dim=1):
            loss = call(row, labels=row, carried_state=carried).loss
            loss.backward()
            carried.advance()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    assert counter.frame_count == 2  # from nothing, and from the row before


@pytest.mark.parametrize("kind", RECURRENCES)
def test_a_compiled_forward_gives_the_eager_logits(kind: str):
    model, ids = make_model(kind), draw_ids(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", RECURRENCES)
def test_an_exported_model_has_the_recurrence_as_one_node(kind: str):
    model = make_model(kind)
    batch, time = Dim("batch", min=2, max=64), Dim("time", min=2, max=model.config.position_limit)
    with torch.no_grad():
        program = export(
            model,
            (),
            {"input_ids": draw_ids(2, 9), "use_cache": False},
            dynamic_shapes={"input_ids": {0: batch, 1: time}, "use_cache": None},
        )
    # Blocks without autocast are graphs of their own inside the graph.
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    layers = sum(layer == "linear_attention" for layer in model.config.layer_types)
    assert names.count(RECURRENCES[kind]) == layers
    for shape in ((2, 9), (3, 17)):
        ids = draw_ids(*shape)
        with torch.no_grad():
            got = program.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits)
