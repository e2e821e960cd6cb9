"""Our models against numbers of the original implementation."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from i3lm.models.i3 import I3Config, I3ForCausalLM
from tests.fixtures.reference import read_meta, read_tensors

# Names of the original, as patterns, and ours; the first match renames.
RENAMED = [
    (r"embed\.weight", "model.embed_tokens.weight"),
    (r"pos_embed\.weight", "model.embed_positions.weight"),
    (r"ln_f\.(.*)", r"model.norm.\1"),
    (r"head\.(.*)", r"lm_head.\1"),
    (r"(layers\.\d+)\.ln1\.(.*)", r"model.\1.mixer_norm.\2"),
    (r"(layers\.\d+)\.ln2\.(.*)", r"model.\1.feed_forward_norm.\2"),
    (r"(layers\.\d+)\.hybrid\.w_mix", r"model.\1.mixer.mix"),
    (r"(layers\.\d+)\.hybrid\.(.*)", r"model.\1.mixer.\2"),
    (r"(layers\.\d+)\.attn\.qkv\.(.*)", r"model.\1.mixer.query_key_value.\2"),
    (r"(layers\.\d+)\.attn\.out_proj\.(.*)", r"model.\1.mixer.output.\2"),
    (r"(layers\.\d+)\.ffn\.0\.(.*)", r"model.\1.feed_forward.up.\2"),
    (r"(layers\.\d+)\.ffn\.2\.(.*)", r"model.\1.feed_forward.down.\2"),
    (r"(layers\.\d+)\.att\.(.*)", r"model.\1.mixer.\2"),
    (r"(layers\.\d+)\.ffn\.(.*)", r"model.\1.feed_forward.\2"),
]
SHIFTS = {"k": "key", "v": "value", "r": "receptance"}


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the original under our names and in our shapes."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, ours in RENAMED:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, ours, name)
                break
        shift = re.fullmatch(r"(.*\.time_mix_)([kvr])", name)
        if shift:
            name, tensor = shift[1] + SHIFTS[shift[2]], tensor.reshape(-1)  # was (1, 1, C)
        renamed[name] = tensor
    return renamed


def make_model(kind: str) -> I3ForCausalLM:
    meta = read_meta()[kind]
    recurrent = meta["hybrid_layers" if kind == "hybrid" else "rwkv_layers"]
    config = I3Config(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["d_model"],
        layer_types=f"{recurrent} x linear_attention, {meta['attn_layers']} x full_attention",
        recurrence="state_space" if kind == "hybrid" else "rwkv4",
        state_size=meta.get("d_state", 1),
        num_attention_heads=meta["n_heads"],
        max_position_embeddings=meta["max_seq_len"],
    )
    model = I3ForCausalLM(config)
    model.load_state_dict(rename(read_tensors(f"{kind}_weights")))
    return model


def cross_entropy(model: I3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())


every_kind = pytest.mark.parametrize("kind", ["hybrid", "rwkv"])


@every_kind
def test_logits_loss_and_every_gradient(kind: str):
    model, numbers = make_model(kind), read_tensors(f"{kind}_io")
    # float32 through up to sixteen layers: sums in another order differ by a few 1e-6.
    logits = model(numbers["input_ids"]).logits
    torch.testing.assert_close(logits, numbers["logits"], rtol=0, atol=1e-5)
    loss = cross_entropy(model, numbers["input_ids"], numbers["targets"])
    torch.testing.assert_close(loss, numbers["loss"], rtol=0, atol=1e-5)
    loss.backward()
    expected = rename(read_tensors(f"{kind}_io", "grad."))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        # The same float32 sums, passed back through all layers.
        assert float(error) < 1e-4, name


@every_kind
def test_losses_of_twelve_training_steps(kind: str):
    model, numbers = make_model(kind).train(), read_tensors(f"{kind}_io")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    losses = []
    for ids, targets in zip(numbers["train_inputs"], numbers["train_targets"], strict=True):
        loss = cross_entropy(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    # Adam's first steps are signs of gradients: rounding of the smallest ones is amplified.
    torch.testing.assert_close(torch.stack(losses), numbers["train_losses"], rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_runs_past_the_context_length(kind: str, use_cache: bool):
    model, numbers = make_model(kind).eval(), read_tensors(f"{kind}_io")
    prompt, expected = numbers["greedy_prompt"], numbers["greedy_output"]
    assert expected.shape[1] > model.config.max_position_embeddings
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=expected.shape[1] - prompt.shape[1],
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    assert torch.equal(output, expected)
