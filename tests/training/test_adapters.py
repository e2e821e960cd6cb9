from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import i3lm.layers.linear
from i3lm.cli import main
from i3lm.errors import ConfigurationError
from i3lm.inference.adapters import Base, merge_adapter, read_base, write_adapter
from i3lm.inference.loading import load_model
from i3lm.inference.sessions import model_fingerprint
from i3lm.presets import make_config
from i3lm.training.adapters import add_adapter, find_targets
from i3lm.training.options import AdapterOptions, TrainingOptions, resolve_defaults
from tests.cli.test_train import held_out_losses, losses
from tests.conftest import TINY_TRAINING

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}
KINDS = {
    "rwkv4": {"layer_types": "linear_attention, full_attention"},
    "rwkv4_hybrid": {"layer_types": "2 x hybrid", "recurrence": "rwkv4"},
    "state_space": {"layer_types": "linear_attention, full_attention", "recurrence": "state_space"},
    "low_rank": {"layer_types": "2 x hybrid", "recurrence": "state_space", "low_rank": 4},
    "gpt2": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32},
}
IDS = torch.arange(48).view(2, 24).remainder(32)


def tiny_model(kind: str):
    torch.manual_seed(0)
    fields = KINDS[kind] if kind == "gpt2" else {**TINY, **KINDS[kind]}
    model = AutoModelForCausalLM.from_config(make_config(fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("vectors", [False, True], ids=["matrices", "vectors"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_written_and_merged(kind: str, vectors: bool, tmp_path: Path):
    model = tiny_model(kind)
    base = copy.deepcopy(model)
    names = [name for name, _ in base.named_parameters()]
    add_adapter(model, AdapterOptions(rank=2, vectors=vectors))
    assert type(model) is type(base)
    assert logits_of(model).equal(logits_of(base))  # it begins with nothing added
    train_a_little(model)
    adapted = logits_of(model)
    assert (adapted - logits_of(base)).abs().max() > 1e-2

    frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, parameter in base.named_parameters():
        is_trained = vectors and parameter.dim() == 1
        assert frozen[name].equal(parameter) is not is_trained, name

    write_adapter(tmp_path, model, Base(tmp_path / "base", model_fingerprint(base)))
    whole = sum(p.numel() for p in base.parameters())
    assert (
        sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) < whole
    )
    merged = merge_adapter(base, tmp_path)
    assert type(merged) is type(model)
    assert [name for name, _ in merged.named_parameters()] == names
    torch.testing.assert_close(logits_of(merged), adapted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["rwkv4", "state_space"])
def test_peft_itself_reads_what_was_written(kind: str, tmp_path: Path):
    from peft import PeftModel

    model = tiny_model(kind)
    base = copy.deepcopy(model)
    add_adapter(model, AdapterOptions(rank=3, alpha=5))
    train_a_little(model)
    write_adapter(tmp_path, model, Base(tmp_path, None))
    read = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits_of(read), logits_of(model), rtol=0, atol=1e-6)


def test_which_matrices_a_target_stands_for():
    model = tiny_model("rwkv4")
    mixers = [f"model.layers.0.mixer.{n}" for n in ("key", "value", "receptance", "output")]
    channels = [f"model.layers.0.feed_forward.{n}" for n in ("key", "receptance", "value")]
    attention = [f"model.layers.1.mixer.{n}" for n in ("query_key_value", "output")]
    network = [f"model.layers.1.feed_forward.{n}" for n in ("up", "down")]
    assert list(find_targets(model, "recurrent")) == mixers
    assert list(find_targets(model, "attention")) == attention
    assert list(find_targets(model, "feed_forward")) == channels + network
    assert list(find_targets(model, "all")) == mixers + channels + attention + network
    assert list(find_targets(model, ["mixer.key", "up"])) == [mixers[0], network[0]]
    hybrid = tiny_model("low_rank")
    assert find_targets(
        hybrid, ["0.mixer.B", "0.feed_forward.up.lora_A", "0.attention.output"]
    ) == {
        "model.layers.0.mixer.B": True,
        "model.layers.0.attention.output": False,
        "model.layers.0.feed_forward.up.lora_A": True,
    }
    assert not [name for name in find_targets(hybrid, "all") if "lm_head" in name]


def test_a_target_that_is_not_there():
    model = tiny_model("rwkv4")
    rule = (
        r"'q_proj' is no matrix of this i3 model: give all, attention, .*mixer\.key, mixer\.value"
    )
    with pytest.raises(ConfigurationError, match=rule):
        add_adapter(model, AdapterOptions(rank=2, targets=["q_proj"]))
    with pytest.raises(ConfigurationError, match="'recurrent' is no matrix of this gpt2 model"):
        find_targets(tiny_model("gpt2"), "recurrent")


def test_dropout_is_for_linear_layers():
    with pytest.raises(ConfigurationError, match=r"dropout \(0.1\) must be 0 for model.layers"):
        add_adapter(tiny_model("state_space"), AdapterOptions(rank=2, dropout=0.1))
    model = tiny_model("rwkv4")
    add_adapter(model, AdapterOptions(rank=2, dropout=0.5))
    train_a_little(model)
    model.train()
    assert not logits_of(model).equal(logits_of(model))


def test_the_base_keeps_its_fast_product(monkeypatch: pytest.MonkeyPatch):
    shapes = []
    product = i3lm.layers.linear.linear

    def count(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(i3lm.layers.linear, "linear", count)
    model = tiny_model("rwkv4")
    logits_of(model)
    before = list(shapes)
    add_adapter(model, AdapterOptions(rank=2))
    shapes.clear()
    logits_of(model)
    assert shapes == before
    assert len(before) == 4 + 3 + 2 + 2 + 1


def test_groups_of_an_adapted_model():
    model = tiny_model("low_rank")
    add_adapter(model, AdapterOptions(rank=2, vectors=True))
    groups = {group["role"]: group["params"] for group in model.parameter_groups(0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 3)[1] for p in groups["matrix"]} == {"lora_A", "lora_B"}
    assert all(p.dim() == 1 for p in groups["other"])
    assert "head" not in groups


def test_defaults_follow_where_a_run_starts():
    plain = TrainingOptions(max_steps=100)
    chosen = {
        (fine_tuning, adapter): resolve_defaults(plain, fine_tuning=fine_tuning, adapter=adapter)
        for fine_tuning, adapter in ((False, False), (True, False), (True, True))
    }
    assert {key: (o.learning_rate, o.warmup_steps) for key, o in chosen.items()} == {
        (False, False): (1e-3, 20), (True, False): (1e-4, 10), (True, True): (1e-3, 10),
    }  # fmt: skip
    own = TrainingOptions(learning_rate=3e-4, warmup_steps=0)
    assert resolve_defaults(own, fine_tuning=True, adapter=True) == own


ADAPTING = list(TINY_TRAINING)
del ADAPTING[:4]  # the model's configuration and the tokenizer are the checkpoint's
ADAPTING += ["--adapter.rank", "4", "--training.max_steps", "20", "--training.save_every", "5"]


@pytest.fixture(scope="module")
def adapted_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "adapted"
    source = ["--model.source", str(tiny_run / "last")]
    assert main(["train", "--output", str(run), *source, *ADAPTING]) == 0
    return run


def test_a_run_leaves_adapters(adapted_run: Path, tiny_run: Path):
    for part in ("best", "last"):
        names = {path.name for path in (adapted_run / part).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
        assert not names & {"config.json", "model.safetensors"}
    base = read_base(adapted_run / "last")
    assert base.path == (tiny_run / "last").resolve()
    assert base.fingerprint == model_fingerprint(load_model(tiny_run / "last"))
    figures = held_out_losses(adapted_run)
    assert figures[-1][1] < figures[0][1]
    # A checkpoint to resume from holds no frozen weight.
    saved = load_file(adapted_run / "checkpoints" / "checkpoint-20" / "model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)


def test_an_adapter_run_resumes_exactly(adapted_run: Path, tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    ignored = shutil.ignore_patterns("checkpoint-1*", "checkpoint-20", "last", "best")
    shutil.copytree(adapted_run, run, ignore=ignored)
    source = ["--model.source", str(tiny_run / "last")]
    assert main(["train", "--output", str(run), "--resume", *source, *ADAPTING]) == 0
    assert losses(run) == losses(adapted_run)
    for part in ("best", "last"):
        tensors, expected = (
            load_file(folder / part / "adapter_model.safetensors") for folder in (run, adapted_run)
        )
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].equal(expected[name]) for name in expected)


def test_other_adapter_options_are_another_run(
    adapted_run: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--model.source", str(tiny_run / "last"), *ADAPTING, "--adapter.rank", "5"]
    assert main(["train", "--output", str(adapted_run), "--resume", *options]) == 2
    assert "begun with adapter.rank 4, now it is 5" in capsys.readouterr().err


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    data = ["--data", "stories", "--size", "32", "--held_out_fraction", "0.1"]
    capsys.readouterr()
    assert main(["evaluate", str(folder), *data, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_commands_take_an_adapter(
    adapted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    figures = evaluate(adapted_run, capsys)
    best = json.loads((adapted_run / "best" / "evaluation.json").read_text())
    assert figures["loss"] == pytest.approx(best["loss"], abs=1e-5)
    assert main(["generate", str(adapted_run), "--prompt", "Once", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Once")

    out = tmp_path / "merged"
    assert main(["merge", str(adapted_run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert evaluate(out, capsys)["loss"] == pytest.approx(best["loss"], abs=1e-5)
    ids = IDS[:, :16]
    with torch.no_grad():
        merged, adapted = (load_model(f)(input_ids=ids).logits for f in (out, adapted_run / "best"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)


def spoil(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(run / "last", folder)
    return folder


def test_a_base_that_is_gone_or_another(
    adapted_run: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = spoil(adapted_run, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    generate = ["generate", str(folder), "--prompt", "Once", "--max_new_tokens", "2"]

    gone = {**config, "base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "adapter_config.json").write_text(json.dumps(gone))
    assert main(generate) == 2
    assert capsys.readouterr().err == (
        f"i3lm generate: error: {folder}: is an adapter of {tmp_path / 'gone'}, which is not "
        "there: put that checkpoint back, or merge the adapter with it: i3lm merge --base PATH\n"
    )
    merging = ["merge", str(folder), str(tmp_path / "merged"), "--base"]
    assert main([*merging, str(tiny_run / "last")]) == 0
    capsys.readouterr()

    other = tmp_path / "other"
    shutil.copytree(tiny_run / "last", other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert main([*merging, str(other), "--overwrite"]) == 2
    assert (
        f"was trained on another base than {other} (the weights differ)" in capsys.readouterr().err
    )


def test_damaged_adapters(adapted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = spoil(adapted_run, tmp_path)
    generate = ["generate", str(folder), "--prompt", "Once", "--max_new_tokens", "2"]
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(iter(tensors))
    for damage in (
        {k: t for k, t in tensors.items() if k != name},
        {**tensors, "base_model.model.model.layers.7.mixer.x": torch.zeros(2)},
        {**tensors, name: torch.zeros(3, 3)},
    ):
        save_file(damage, path, metadata=metadata)
        assert main(generate) == 2
        error = capsys.readouterr().err
        assert f"{folder}: the adapter does not fit its base, or is damaged: " in error
        assert error.count("\n") == 1
    path.write_bytes(path.read_bytes()[:100])
    assert main(generate) == 2
    assert f"{folder}: the adapter cannot be read" in capsys.readouterr().err


def test_what_is_no_adapter_is_not_merged_and_an_adapter_needs_a_checkpoint(
    tiny_run: Path, adapted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["merge", str(tiny_run), str(tmp_path / "out")]) == 2
    assert "is a whole model, not an adapter" in capsys.readouterr().err
    assert main(["quantize", str(adapted_run), "--output", str(tmp_path / "out")]) == 2
    assert "is an adapter: merge it into its base first" in capsys.readouterr().err
    options = [*TINY_TRAINING, "--adapter.rank", "4"]
    assert main(["train", "--output", str(tmp_path / "run"), *options]) == 2
    assert "adapter.rank (4) adapts a checkpoint, and new model is drawn anew" in (
        capsys.readouterr().err
    )


def test_an_adapter_is_a_base_itself(adapted_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ["--model.source", str(adapted_run), *ADAPTING, "--training.max_steps", "2"]
    assert main(["train", "--output", str(run), *options]) == 0
    assert read_base(run / "last").path == (adapted_run / "best").resolve()
    assert held_out_losses(run)[0][1] == pytest.approx(
        json.loads((adapted_run / "best" / "evaluation.json").read_text())["loss"], abs=1e-5
    )
    load_model(run / "last")


def test_with_gradient_checkpointing(adapted_run: Path, tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ["--training.gradient_checkpointing", "true", "--training.max_steps", "4"]
    source = ["--model.source", str(tiny_run / "last")]
    assert main(["train", "--output", str(run), *source, *ADAPTING, *options]) == 0
    assert len(losses(run)) == 4
    # The loss is summed over pieces of the vocabulary in place of pieces of the rows.
    assert losses(run)[1] == pytest.approx(losses(adapted_run)[1], rel=1e-6)
    assert losses(run)[4] == pytest.approx(losses(adapted_run)[4], abs=1e-3)
