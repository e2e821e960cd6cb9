"""Checkpoints of the original, against the logits that the original itself gave for them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i3lm.errors import CheckpointError, ConfigurationError
from i3lm.models.i3.conversion_open_i3 import build_model, read_open_i3

FOLDER = Path(__file__).parents[1] / "fixtures" / "open_i3"
ARTIFACTS = FOLDER / "open-i3-80m-artifacts"
BEST = FOLDER / "open-i3-80m-best.bin"
RUN = FOLDER / "open-i3-200m-run"
# float32: the original sums in another order. Measured: under 5e-7.
TOLERANCE = 1e-5


def load_tensors(path: Path = ARTIFACTS / "pytorch_model.bin") -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Malicious:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        import os

        return os.mkdir, (str(self.folder),)


# What comes out


@pytest.mark.parametrize(
    ("source", "heads", "name"),
    [
        (ARTIFACTS, None, "hybrid"),
        (ARTIFACTS / "pytorch_model.bin", None, "hybrid"),
        (BEST, None, "hybrid"),
        (RUN, 12, "rwkv"),
    ],
    ids=["80m-folder", "80m-file", "80m-best", "200m-run"],
)
def test_logits_are_the_originals(source: Path, heads: int | None, name: str):
    model = build_model(read_open_i3(source, heads))
    reference = load_file(FOLDER / "artifact_logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids=reference[f"{name}.input_ids"]).logits
    torch.testing.assert_close(logits, reference[f"{name}.logits"], rtol=0, atol=TOLERANCE)


def test_sizes_come_from_the_tensors():
    checkpoint = read_open_i3(ARTIFACTS)
    config = checkpoint.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (188, 32, 128)
    assert (config.state_size, config.max_position_embeddings) == (8, 24)
    assert config.layer_types == ["linear_attention"] * 10 + ["full_attention"] * 6
    assert (config.recurrence, config.initialization) == ("state_space", "original")
    assert config.num_attention_heads == 16
    assert "config.json says d_state 64, the tensors say 8: using 8" in checkpoint.notes
    assert checkpoint.tokenizer == ARTIFACTS / "tokenizer.json"


def test_the_run_of_a_200m_is_read_without_a_config():
    checkpoint = read_open_i3(RUN, 12)
    config = checkpoint.config
    assert config.layer_types == ["linear_attention"] * 2 + ["full_attention"]
    assert (config.recurrence, config.num_attention_heads) == ("rwkv4", 12)
    assert checkpoint.tokenizer == RUN / "tokenizer.json"
    assert checkpoint.notes == []


def test_the_order_of_layers_is_the_checkpoints(tmp_path: Path):
    """Layers 9 (recurrent) and 10 (attention) trade places."""
    swap = {"9": "10", "10": "9"}
    swapped = {}
    for name, tensor in load_tensors().items():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = swap.get(parts[1], parts[1])
        swapped[".".join(parts)] = tensor
    config = read_open_i3(save(tmp_path / "swapped.bin", swapped), 16).config
    assert config.layer_types[8:11] == ["linear_attention", "full_attention", "linear_attention"]


def test_the_newest_iteration_is_taken(tmp_path: Path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for iteration in (9000, 10000):  # as text, 9000 would be the later one
        shutil.copyfile(
            RUN / "checkpoints" / "model_iter_1000.pt", checkpoints / f"model_iter_{iteration}.pt"
        )
    for source in (tmp_path, checkpoints):
        assert read_open_i3(source, 12).weights.name == "model_iter_10000.pt"


def test_weights_in_half_precision_become_float32(tmp_path: Path):
    halves = {name: tensor.half() for name, tensor in load_tensors().items()}
    checkpoint = read_open_i3(save(tmp_path / "half.bin", halves), 16)
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float32}
    assert checkpoint.notes == ["tensors of type torch.float16 are converted to torch.float32"]


# Heads, which no tensor tells


def test_heads_that_nothing_tells_are_asked_for():
    with pytest.raises(CheckpointError, match=r"--num-attention-heads N, .*48: one of 1, 2, 3, 4"):
        read_open_i3(RUN)


def test_heads_of_the_config_that_do_not_divide_are_refused(tmp_path: Path):
    shutil.copyfile(ARTIFACTS / "pytorch_model.bin", tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"n_heads": 5}))
    with pytest.raises(CheckpointError, match=r"config\.json says 5.*--num-attention-heads"):
        read_open_i3(tmp_path)


def test_heads_asked_for_must_divide_the_width():
    with pytest.raises(ConfigurationError, match=r"\(5\) must divide hidden_size \(48\)"):
        read_open_i3(RUN, 5)


def test_heads_asked_for_win_over_the_config():
    checkpoint = read_open_i3(ARTIFACTS, 8)
    assert checkpoint.config.num_attention_heads == 8
    assert "config.json says n_heads 16: using 8 as asked" in checkpoint.notes


# What is refused


def test_a_missing_tensor_is_named(tmp_path: Path):
    tensors = load_tensors()
    del tensors["layers.3.hybrid.A"]
    with pytest.raises(CheckpointError, match=r"the tensor layers\.3\.hybrid\.A is missing"):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


def test_an_unknown_tensor_is_named(tmp_path: Path):
    tensors = {**load_tensors(), "layers.0.moe.gate": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"the tensor layers\.0\.moe\.gate"):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


def test_a_missing_layer_is_noticed(tmp_path: Path):
    tensors = {k: v for k, v in load_tensors().items() if not k.startswith("layers.7.")}
    with pytest.raises(CheckpointError, match=r"the tensor layers\.8\."):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path):
    tensors = {**load_tensors(), "layers.2.ffn.2.weight": torch.zeros(32, 64)}
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.2\.weight .*\(32, 64\).*\(32, 128"):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


def test_two_recurrences_in_one_model_are_refused(tmp_path: Path):
    tensors = load_tensors()
    tensors["layers.10.att.time_decay"] = torch.zeros(32)
    del tensors["layers.10.attn.qkv.weight"], tensors["layers.10.attn.qkv.bias"]
    del tensors["layers.10.attn.out_proj.weight"], tensors["layers.10.attn.out_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layer 0 has hybrid\.\* and layer 10 has att\.\*"):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


def test_undefined_numbers_are_refused(tmp_path: Path):
    tensors = load_tensors()
    tensors["head.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.bias holds infinite or undefined"):
        read_open_i3(save(tmp_path / "model.bin", tensors), 16)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"epoch": 3}, {"model_state_dict": {}}], ids=repr
)  # fmt: skip
def test_something_else_than_tensors_is_refused(content: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"other\.bin: "):
        read_open_i3(save(tmp_path / "other.bin", content))


@pytest.mark.parametrize("kept", [0, 10, 1000, 400_000])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path):
    path = tmp_path / "short.bin"
    path.write_bytes(BEST.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"short\.bin: cannot be read .*cut short"):
        read_open_i3(path)


def test_changed_bytes_are_noticed(tmp_path: Path):
    content = bytearray(BEST.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(255 - byte for byte in content[middle : middle + 4])
    path = tmp_path / "changed.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed\.bin: damaged: the checksum"):
        read_open_i3(path)


def test_a_plain_text_is_refused(tmp_path: Path):
    path = tmp_path / "text.bin"
    path.write_text("Once upon a time\n")
    with pytest.raises(CheckpointError, match="another kind of file"):
        read_open_i3(path)


@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_checkpoint_never_runs(protocol: int | None, tmp_path: Path):
    made = tmp_path / "made"
    content = {"embed.weight": Malicious(made)}
    path = tmp_path / "malicious.bin"
    if protocol is None:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError) as caught:
        read_open_i3(path)
    assert not made.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message
    if protocol is None:
        assert "holds more than tensors: it asks for" in message


def test_a_place_without_a_checkpoint_says_what_belongs_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none of pytorch_model\.bin"):
        read_open_i3(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_open_i3(tmp_path / "nowhere")


def test_a_damaged_config_is_named(tmp_path: Path):
    shutil.copyfile(ARTIFACTS / "pytorch_model.bin", tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        read_open_i3(tmp_path)


# The tokenizer that belongs to it


def test_the_tokenizer_of_a_run_lies_above_its_weights(tmp_path: Path):
    """The 80m writes its tokenizer beside the folder of the model files."""
    artifacts = tmp_path / "i3-model-artifacts"
    artifacts.mkdir()
    shutil.copyfile(ARTIFACTS / "pytorch_model.bin", artifacts / "pytorch_model.bin")
    assert read_open_i3(artifacts, 16).tokenizer is None
    shutil.copyfile(ARTIFACTS / "tokenizer.json", tmp_path / "tokenizer.json")
    assert read_open_i3(artifacts, 16).tokenizer == tmp_path / "tokenizer.json"
    shutil.copyfile(ARTIFACTS / "tokenizer.json", artifacts / "vocab.json")
    assert read_open_i3(artifacts, 16).tokenizer == artifacts / "vocab.json"
