"""``i3lm convert`` as a person meets it: a process with a status, an output and files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i3lm.cli.convert import convert
from i3lm.errors import CheckpointError, ConfigurationError, OutputError, TokenizerError
from i3lm.inference.loading import load_checkpoint
from i3lm.tokenizers import load_tokenizer, tokenizer_fingerprint

FOLDER = Path(__file__).parents[1] / "fixtures" / "open_i3"
ARTIFACTS = FOLDER / "open-i3-80m-artifacts"
RUN = FOLDER / "open-i3-200m-run"
LOGITS = FOLDER / "artifact_logits.safetensors"


def i3lm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "i3lm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


class Malicious:
    """Pickles as a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


# Through real processes


def test_a_converted_model_generates(tmp_path: Path):
    out = tmp_path / "models" / "i3-80m"
    result = i3lm("convert", ARTIFACTS, out, "--reference_logits", f"{LOGITS}:hybrid")
    assert (result.returncode, result.stderr) == (0, "")
    assert "180,476 parameters, layers 10 state_space + 6 attention" in result.stdout
    assert "note: config.json says d_state 64, the tensors say 8: using 8" in result.stdout
    assert "read back: logits differ by at most 0\n" in result.stdout
    assert "reference: logits differ by at most" in result.stdout
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert "https://github.com/FlameF0X/open-i3" in (out / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["i3-80m"]

    result = i3lm("generate", out, "--prompt", "once upon", "--max_new_tokens", 5, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 5


@pytest.mark.parametrize("kind", ["missing heads", "truncated", "malicious", "existing output"])
def test_a_refusal_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path):
    source, out, made = tmp_path / "weights.bin", tmp_path / "out", tmp_path / "made"
    before = []
    if kind == "missing heads":
        shutil.copyfile(RUN / "checkpoints" / "model_iter_1000.pt", source)
        expected = "pass --num-attention-heads N"
    elif kind == "truncated":
        source.write_bytes((ARTIFACTS / "pytorch_model.bin").read_bytes()[:300_000])
        expected = "cut short"
    elif kind == "malicious":
        torch.save({"embed.weight": Malicious(made)}, source)
        expected = "holds more than tensors"
    else:
        shutil.copyfile(ARTIFACTS / "pytorch_model.bin", source)
        out.mkdir()
        (out / "mine.txt").write_text("keep")
        before, expected = ["mine.txt"], "is not empty; pass --overwrite"
    result = i3lm("convert", source, out)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("i3lm convert: error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert not made.exists()
    assert sorted(path.name for path in out.glob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"weights.bin", "out"}


# The command itself


def test_json_tells_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert(
        str(RUN), str(tmp_path / "out"), num_attention_heads=12,
        reference_logits=f"{LOGITS}:rwkv", json=True,
    )  # fmt: skip
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 121_520
    assert figures["layers"] == {"linear_attention": 2, "full_attention": 1}
    assert figures["reference_difference"] < 1e-5
    assert figures["written_difference"] == 0


def test_the_model_knows_its_tokenizer(tmp_path: Path):
    convert(str(RUN), str(tmp_path / "out"), num_attention_heads=12)
    model, tokenizer = load_checkpoint(tmp_path / "out")
    original = load_tokenizer(RUN / "tokenizer.json")
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(original)
    assert tokenizer("Once upon")["input_ids"] == original("Once upon")["input_ids"]
    assert (model.config.pad_token_id, model.config.bos_token_id) == (1, 2)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 3


def test_without_a_tokenizer_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert(str(FOLDER / "open-i3-80m-best.bin"), str(tmp_path / "out"))
    assert "tokenizer: none found" in capsys.readouterr().out
    with pytest.raises(TokenizerError):
        load_checkpoint(tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"320 tokens, but the model's vocab_size is 188"):
        convert(str(ARTIFACTS), str(tmp_path / "out"), tokenizer=str(RUN / "tokenizer.json"))
    assert not (tmp_path / "out").exists()


def test_a_smaller_tokenizer_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = str(ARTIFACTS / "tokenizer.json")
    convert(str(RUN), str(tmp_path / "out"), num_attention_heads=12, tokenizer=tokenizer)
    assert "note: the tokenizer has 188 tokens and the model 320" in capsys.readouterr().out


def test_overwriting_replaces_a_model(tmp_path: Path):
    (tmp_path / "out").mkdir()
    stale = tmp_path / "out" / "model-00001-of-00002.safetensors"
    stale.write_text("old")
    convert(str(ARTIFACTS), str(tmp_path / "out"), overwrite=True)
    assert not stale.exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_overwriting_spares_what_is_no_model(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds diary\.txt, which is no part of a model"):
        convert(str(ARTIFACTS), str(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "diary.txt").read_text() == "mine"


def test_wrong_heads_fail_against_the_reference(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"logits differ by up to .* more than 0\.0001"):
        convert(
            str(RUN), str(tmp_path / "out"), num_attention_heads=6,
            reference_logits=f"{LOGITS}:rwkv",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"of another model|not of this model"):
        convert(str(ARTIFACTS), str(tmp_path / "out"), reference_logits=f"{LOGITS}:rwkv")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (f"{LOGITS}:nothing", "holds no nothing.input_ids"),
        (f"{LOGITS}", "holds no input_ids"),
        ("nowhere.safetensors:hybrid", "there is no file nowhere.safetensors"),
        (f"{ARTIFACTS / 'config.json'}", "not readable as safetensors"),
    ],
    ids=["set", "no set", "file", "kind"],
)
def test_a_reference_that_cannot_be_read(reference: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=message):
        convert(str(ARTIFACTS), str(tmp_path / "out"), reference_logits=reference)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="is a file"):
        convert(str(ARTIFACTS), str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        convert(str(ARTIFACTS), str(tmp_path / "file" / "out"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="holds the working folder"):
        convert(str(ARTIFACTS), ".", overwrite=True)
    with pytest.raises(OutputError, match="holds the checkpoint"):
        convert(str(ARTIFACTS), str(ARTIFACTS), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
