"""Every problem that a person can mend ends in status 2 and one line that tells how."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from i3lm.cli import main
from i3lm.tokenizers import load_tokenizer, train_tokenizer
from tests.conftest import TINY_TRAINING, Process

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = ["train", "--output", "out", *TINY_TRAINING]


@pytest.fixture
def refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Checks that a command, run in an empty folder, ends with just this message."""
    monkeypatch.chdir(tmp_path)

    def check(arguments: list[object], message: str, *, command: str | None = None) -> None:
        before = snapshot(tmp_path)
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        command = command or str(arguments[0])
        assert re.fullmatch(f"i3lm {command}: error: {re.escape(message)}\n", captured.err), (
            captured.err
        )
        assert (status, captured.out) == (2, "")
        assert snapshot(tmp_path) == before

    return check


def snapshot(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder, by path; a folder has none."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def assert_one_line(finished: subprocess.CompletedProcess[str], message: str) -> None:
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr == message + "\n"
    assert finished.stdout == ""


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--output is required; see i3lm train --help"),
        (["generate"], "CHECKPOINT and --prompt are required; see i3lm generate --help"),
        (["chat"], "CHECKPOINT is required; see i3lm chat --help"),
        (["evaluate", "x"], "--data is required; see i3lm evaluate --help"),
        (["train", "--output"], "--output needs a value; see i3lm train --help"),
        (
            ["train", "--output", "out", "--learning_rate", "3"],
            "unknown option --learning-rate; did you mean --training.learning-rate?",
        ),
        (  # a prefix is not the option
            ["train", "--output", "out", "--training.learning_rat=3"],
            "unknown option --training.learning-rat; did you mean --training.learning-rate?",
        ),
        (
            ["generate", "x", "--prompt", "a", "--temprature", "1"],
            "unknown option --temprature; did you mean --temperature?",
        ),
        (["models", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["models", "all"], "unexpected argument 'all'; see i3lm models --help"),
        (
            ["train", "--output", "out", "--resume=yes"],
            "--resume takes no value, but was given 'yes'",
        ),
        (
            ["train", "--output", "out", "--training.max_steps", "ten"],
            "training.max_steps (ten) must be a whole number or null",
        ),
        (
            ["train", "--output", "out", "--training.batch_size", "1.5"],
            "training.batch_size (1.5) must be a whole number",
        ),
        (
            ["train", "--output", "out", "--training.learning_rate", "fast"],
            "training.learning_rate (fast) must be a number or null",
        ),
        (
            ["train", "--output", "out", "--model.config", "5"],
            "model.config (5) must be a mapping, such as '{key: value}'",
        ),
        (
            ["train", "--output", "out", "--sample.prompts", "hello"],
            "sample.prompts (hello) must be a list, such as '[first, second]'",
        ),
        (
            ["train", "--output", "out", "--training", "nowhere"],
            "--training (nowhere) must be the path of a YAML file; one option is set with "
            "--training.NAME",
        ),
        (
            ["train", "--output", "out", "--training.max_steps", "0"],
            "training.max_steps (0) must be at least 1",
        ),
        (
            ["train", "--output", "out", "--training.max_steps", "3", "--training.epochs", "2"],
            "training.max_steps (3) and training.epochs (2.0) exclude each other: give one, or "
            "set the other to null",
        ),
        (
            ["train", "--output", "out", "--training.adam_beta2", "1"],
            "training.adam_beta2 (1.0) must be at least 0 and below 1",
        ),
        (
            ["train", "--output", "out", "--data.held_out_fraction", "1.5"],
            "data.held_out_fraction (1.5) must be above 0 and below 1",
        ),
        (
            ["train", "--output", "out", "--sample.temperature=-1"],
            "sample.temperature (-1.0) must be 0 (always the likeliest) or above",
        ),
        (
            ["train", "--output", "out", "--sample.every=-1"],
            "sample.every (-1) must be 0 (only at the end) or above",
        ),
        (
            ["train", "--output", "out", "--training.device", "tpu"],
            "unknown device 'tpu': use auto, cpu, cuda or mps",
        ),
        (
            ["train", "--output", "out", "--training.precision", "fp8"],
            "unknown precision 'fp8': use auto, fp32, bf16 or fp16",
        ),
        (
            ["train", "--output", "out", "--resume", "--overwrite"],
            "--resume and --overwrite exclude each other: give one",
        ),
    ],
)
def test_options(refuses, arguments: list[str], message: str):
    refuses(arguments, message)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--temperature=-1", "temperature (-1.0) must be 0 (always the likeliest) or above"),
        ("--top_k=-1", "top_k (-1) must be 0 (all tokens) or above"),
        ("--top_p=0", "top_p (0.0) must be above 0 and at most 1"),
        ("--max_new_tokens=0", "max_new_tokens (0) must be at least 1"),
    ],
)
def test_sampling_options(refuses, command: str, option: str, message: str):
    prompt = ["--prompt", "a"] if command == "generate" else []
    refuses([command, "x", *prompt, option], message)


def test_policy_past_the_context(refuses):
    refuses(
        ["generate", "x", "--prompt", "a", "--context-overflow", "slide"],
        "context_overflow (slide) must be one of error, window, shift",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"training:\n  learning_rat: 1\n",
            "unknown key 'training.learning_rat'; did you mean 'training.learning_rate'?",
        ),
        (
            b"trainin:\n  learning_rate: 1\n",
            "unknown key 'trainin.learning_rate'; did you mean 'training.learning_rate'?",
        ),
        (
            b"model:\n  config:\n    hiden_size: 16\n",
            "model.config: unknown key 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            b"training:\n  learning_rate: fast\n",
            "training.learning_rate (fast) must be a number or null",
        ),
        (
            b"- training\n",
            "the file given with --config must be a mapping of options; see i3lm train --help",
        ),
        (
            b"data:\n  source: caf\xe9\n",
            "a file given with the options is not UTF-8 text (invalid continuation byte at byte "
            "19): convert it first, for example with: iconv -f latin1 -t utf-8",
        ),
    ],
)
def test_yaml(refuses, tmp_path: Path, content: bytes, message: str):
    Path("run.yaml").write_bytes(content)
    refuses(["train", "--config", "run.yaml", "--output", "out"], message)


def test_yaml_that_does_not_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.yaml"
    path.write_text("training: [1\n")
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"i3lm train: error: the file given with --config is not readable as YAML: .*line 1.*\n",
        error,
    )


def test_missing_yaml(refuses, tmp_path: Path):
    refuses(
        ["train", "--config", "no.yaml", "--output", "out"],
        f"{tmp_path / 'no.yaml'}: no such file; give the path of a YAML file with --config",
    )


# Models and tokenizers

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1},
            [],
            "a model of type mamba sets no context length: give training.context_length",
        ),
        (
            {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 32},
            [],
            "a model of type bert with these fields sees the tokens that it is to predict: choose "
            "a causal one (some types have a field is_decoder to set)",
        ),
        (
            {"model_type": "rwkv", "hidden_size": 16, "num_hidden_layers": 1},
            [],
            "a model of type rwkv with these fields does not run: division by zero; change "
            "model.config",
        ),
        (
            GPT2,
            [],
            "max_new_tokens (20) must be at most 16 after a prompt of 17 tokens: this gpt2 model "
            "has 32 positions",
        ),
        (
            {"model_type": "ctrl", "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 32},
            ["--training.gradient_checkpointing", "true", "--training.context_length", "8"],
            "training.gradient_checkpointing: a model of type ctrl does not support it; leave it "
            "out",
        ),
    ],
    ids=["no context", "not causal", "fields", "positions", "checkpointing"],
)  # fmt: skip
def test_peers(refuses, config: dict, options: list[str], message: str):
    prompts = ["--sample.prompts", '["Once upon a time,"]']
    refuses([*TRAIN, "--model.config", json.dumps(config), *prompts, *options], message)


def test_generating_past_the_positions_of_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    options = ["--model.config", json.dumps(GPT2), "--training.max_steps", "1"]
    options += ["--sample.every", "0", "--sample.prompts", "[]"]
    assert main(["train", "--output", str(run), *TINY_TRAINING, *options]) == 0
    capsys.readouterr()
    generate = ["generate", str(run), "--prompt", "Once"]
    assert main([*generate, "--max-new-tokens", "29"]) == 0
    capsys.readouterr()
    assert main([*generate, "--max-new-tokens", "30"]) == 2
    assert capsys.readouterr().err == (
        "i3lm generate: error: max_new_tokens (30) must be at most 29 after a prompt of 4 tokens: "
        "this gpt2 model has 32 positions\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert main(["chat", str(run), "--max-new-tokens", "30"]) == 0
    chat = capsys.readouterr()
    assert "i3:" not in chat.out
    assert chat.err.startswith("max_new_tokens (30) must be at most 29 after a prompt of 4 tokens")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"hidden_size": 512, "num_attention_heads": 5},
            "num_attention_heads (5) must divide hidden_size (512)",
        ),
        ({"hidden_size": "big"}, "hidden_size ('big') must be a whole number of at least 1"),
        (
            {"layer_types": "3 x mamba"},
            "layer_types: '3 x mamba' is not of the form 'N x TYPE' with TYPE one of "
            "linear_attention, full_attention, sliding_attention, hybrid",
        ),
        (
            {"model_type": "gtp2"},
            "model_type 'gtp2' is unknown: use i3, or a causal model that transformers knows, such "
            "as gpt2 or llama",
        ),
    ],
)
def test_model_config(refuses, config: dict, message: str):
    refuses(
        ["train", "--output", "out", "--model.config", json.dumps(config)],
        f"model.config: {message}",
    )


def test_presets(refuses):
    from i3lm.presets import list_presets

    names = ", ".join(list_presets())
    train = ["train", "--output", "out", "--model.source"]
    refuses(
        [*train, "i3-13m"],
        f"unknown preset 'i3-13m': use one of {names}, the path of a YAML file, or a checkpoint "
        "folder",
    )
    refuses([*train, "no.yaml"], "no.yaml: no such file; give the path of a YAML preset")
    Path("mine.yaml").write_text("model:\n  hiden_size: 16\n")
    refuses(
        [*train, "mine.yaml"],
        "mine.yaml: unknown key 'hiden_size'; did you mean 'hidden_size'?",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--training.context_length", "64"],
            "training.context_length (64) must be between 1 and the model's "
            "max_position_embeddings (32)",
        ),
        (
            ["--tokenizer.source", "bpe", "--tokenizer.vocab_size", "50"],
            "vocab_size (50) must be at least 260 for a byte-level BPE tokenizer (4 special "
            "tokens and 256 bytes): raise vocab_size or use the character tokenizer",
        ),
        (
            ["--tokenizer.source", "bpe", "--tokenizer.lowercase", "true"],
            "tokenizer.lowercase (True) applies to the character tokenizer, not to bpe: leave it "
            "out",
        ),
        (
            ["--tokenizer.source", "saved", "--tokenizer.vocab_size", "50"],
            "tokenizer.vocab_size (50) cannot change the tokenizer saved: leave it out, or train "
            "one with tokenizer.source bpe, chunk, character",
        ),
        (
            ["--sample.prompts", json.dumps(["x" * 40])],
            "the prompt has 40 tokens, and this model's context is 32: shorten the prompt",
        ),
    ],
)
def test_options_that_do_not_fit_each_other(refuses, options: list[str], message: str):
    refuses([*TRAIN, *options], message)


# Text

_KINDS = ".txt, .jsonl or .parquet files, a Hub name (owner/name), or a built-in corpus"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, f"no such file; give the path of {_KINDS} (pydocs, stories)"),
        ("empty.txt", b"", "is empty; give a file with text in it"),
        ("blank.txt", b"\n \n", "holds no text; give a source with at least one document"),
        (
            "latin.txt",
            "café\n".encode("latin1"),
            "is not UTF-8 (byte 0xe9 cannot be decoded); convert it first, for example with: "
            "iconv -f latin1 -t utf-8",
        ),
        (
            "text.pdf",
            b"%PDF",
            "unknown file type '.pdf'; known: .txt, .jsonl, .parquet, the first two also with "
            ".gz, .bz2, .xz, .zst after it",
        ),
        (
            "one.txt",
            b"one document",
            "no document falls into the held-out part with held_out_fraction 0.1: give more "
            "documents or another fraction",
        ),
    ],
)
def test_text(refuses, name: str, content: bytes | None, message: str):
    if content is not None:
        Path(name).write_bytes(content)
    refuses([*TRAIN, "--data.source", name], f"{name}: {message}")


def test_text_shorter_than_one_context(refuses):
    mark = "\n<|endoftext|>\n"
    Path("short.txt").write_text(mark.join(["one", "two", "three", "four"]))
    refuses(
        [*TRAIN, "--data.source", "short.txt", "--data.held_out_fraction", "0.5"],
        "the text has 5 tokens, and one row needs 33 (the context length and one more): give "
        "more text or a smaller context_length",
    )


def test_hub_name_while_offline(i3lm: Process, tmp_path: Path):
    finished = i3lm(*TRAIN, "--data.source", "some/name", cwd=tmp_path)
    assert finished.returncode == 2
    assert re.fullmatch(
        r"i3lm train: error: some/name: could not be opened on the Hub \(split 'train'\): .*; "
        r"check the name and the network, or give the path of a local file\n",
        finished.stderr,
    )
    assert not list(tmp_path.iterdir())


# Output folders


def test_output_in_a_file(refuses):
    Path("file").write_text("mine")
    refuses(["train", "--output", "file"], "file: is a file; give a folder")
    refuses(
        ["train", "--output", "file/run"],
        "file/run: cannot be written: nothing can be created in file (Not a directory); give "
        "another folder",
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_output_in_a_place_that_cannot_be_written(refuses):
    refuses(
        ["train", "--output", "/proc/run"],
        "/proc/run: cannot be written: nothing can be created in /proc (No such file or "
        "directory); give another folder",
    )


def test_output_with_other_things(refuses):
    message = "other: is not empty and holds no run of i3lm; give a new folder"
    Path("other").mkdir()
    Path("other/config.yaml").write_text("mine: true\n")
    for options in ([], ["--overwrite"], ["--resume"]):
        refuses(["train", "--output", "other", *options], message)


def test_output_with_a_run(refuses, tiny_run: Path):
    shutil.copytree(tiny_run, "run", symlinks=True)
    for command in ("train", "quickstart"):
        refuses(
            [command, "--output", "run"],
            "run: already holds a run; replace it with --overwrite, give another --output, or "
            "go on with it: i3lm train --resume",
        )


def test_resume_without_a_run(refuses):
    message = "no: holds no run to resume; leave --resume out to begin one"
    refuses(["train", "--output", "no", "--resume"], message)


def test_resume_with_changed_options(refuses, tiny_run: Path):
    shutil.copytree(tiny_run, "run")
    changed = ["train", "--output", "run", "--resume", *TINY_TRAINING]
    for option, before, now in (
        ("training.learning_rate", 0.01, 0.5),
        ("data.size", 32, 50),
        ("tokenizer.source", "'character'", "'bpe'"),
    ):
        refuses(
            [*changed, f"--{option}", str(now).strip("'")],
            f"run: the run was begun with {option} {before}, now it is {now}: resume with the "
            "same options, or begin another run",
        )


def test_overwriting_leaves_other_files_alone(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "notes.md").write_text("mine")
    options = ["--training.max_steps", "1", "--sample.every", "0"]
    arguments = ["train", "--output", str(run), "--overwrite", *TINY_TRAINING, *options]
    assert main(arguments) == 0
    assert (run / "notes.md").read_text() == "mine"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert not (run / "samples.jsonl").exists()


# Checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


_WEIGHTS = "model: the weights cannot be read; the file is damaged, cut short, or of another model"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        shutil.rmtree,
        "model: no such folder; give a checkpoint folder or the output folder of a run",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "model: holds no model (no config.json); give a checkpoint folder or the output folder "
        "of a run; a checkpoint of open-i3 is read by `i3lm convert` first",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model: holds no weights (model.safetensors is missing)",
    ),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), _WEIGHTS + ": "),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        _WEIGHTS + ": ",
    ),
    "missing tensors": (
        remove_tensors,
        "model: the weights do not fit config.json: 2 tensors are missing or unknown, such as "
        "lm_head.weight",
    ),
    "other shapes": (lambda folder: set_config(folder, hidden_size=32), _WEIGHTS + ": "),
    "truncated config": (
        lambda folder: truncate(folder / "config.json"),
        "model/config.json: not a readable model configuration: ",
    ),
    "config of another type": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "model/config.json: not a readable model configuration: ",
    ),
    "heads that do not divide": (
        lambda folder: set_config(folder, num_attention_heads=5),
        "model/config.json: not a readable model configuration: num_attention_heads (5) must "
        "divide hidden_size (16)",
    ),
    "truncated tokenizer": (
        lambda folder: truncate(folder / "tokenizer.json"),
        "the tokenizer 'model' cannot be loaded (",
    ),
    "larger tokenizer": (
        lambda folder: train_tokenizer("bpe", ["text"], vocab_size=300).save_pretrained(folder),
        "model: the tokenizer has 260 tokens, but the model's vocab_size is ",
    ),
    "other tokenizer of the same size": (
        lambda folder: swap_two_characters(folder),
        "model: the tokenizer is not the one that the model was trained with (its fingerprint "
        "differs), so its ids mean other text; restore the original tokenizer",
    ),
}


def swap_two_characters(folder: Path) -> None:
    size = len(load_tokenizer(folder))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    assert len(load_tokenizer(folder)) == size


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run / "best", "model")
    do, message = DAMAGE[damage]
    do(Path("model"))
    assert main(["generate", "model", "--prompt", "a"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"i3lm generate: error: {message}")


def test_damaged_checkpoints_to_resume_from(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoints = run / "checkpoints"
    for step, name in ((60, "optimizer.pt"), (50, "model.safetensors"), (40, "rng_state.pth")):
        truncate(checkpoints / f"checkpoint-{step}" / name)
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "checkpoint-" in line]
    for line, step in zip(lines[:3], (60, 50, 40), strict=True):
        assert re.fullmatch(
            rf"{checkpoints}/checkpoint-{step}: is damaged: [\w.]+ has [\d,]+ bytes instead of "
            r"[\d,]+; going back to the checkpoint before it",
            line,
        )
    assert lines[3:] == [f"resuming from {checkpoints}/checkpoint-30"]
    weights = [(f / "last" / "model.safetensors").read_bytes() for f in (run, tiny_run)]
    assert weights[0] == weights[1]

    for path in checkpoints.iterdir():
        truncate(path / "optimizer.pt")
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"i3lm train: error: {checkpoints}/checkpoint-10: is damaged: optimizer.pt has .*; no "
        "checkpoint before it is left: begin again with --overwrite",
        last_line,
    )


def test_checkpoint_of_another_model_to_resume_from(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other"
    wider = ["--model.config.hidden_size", "8", "--training.max_steps", "1"]
    assert main(["train", "--output", str(other), *TINY_TRAINING, *wider]) == 0
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = run / "checkpoints" / "checkpoint-70"
    shutil.copytree(other / "checkpoints" / "checkpoint-1", checkpoint)
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"i3lm train: error: {checkpoint}: is of another model, or of ")
    assert "size mismatch for model.embed_tokens.weight" in last_line


def test_figures_of_the_best_model_that_cannot_be_read(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "best" / "evaluation.json").write_text("{")
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"i3lm train: error: {run}/best/evaluation.json: is damaged, so the best loss of the run "
        f"is unknown; remove {run}/best to keep the next best model"
    )


# What the machine refuses


def test_an_error_that_is_not_of_the_output_names_its_own_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(self):
        raise OSError(5, "Input/output error", "rows.bin")

    monkeypatch.setattr("i3lm.data.rows.RowBatches.__next__", fail)
    assert main(["train", "--output", str(tmp_path / "out"), *TINY_TRAINING]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "i3lm train: error: [Errno 5] Input/output error: 'rows.bin'; --debug shows where"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_standard_output_that_cannot_be_written(process_environment: dict[str, str]):
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "i3lm", "models", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=process_environment, timeout=60,
        )  # fmt: skip
    assert finished.stderr.splitlines()[0] == (
        "i3lm models: error: [Errno 28] No space left on device; --debug shows where"
    )
    assert "Traceback" not in finished.stderr


# As processes


def test_processes_end_with_one_line(i3lm: Process, tiny_run: Path, tmp_path: Path):
    assert_one_line(i3lm("trian"), "i3lm: error: unknown command 'trian'; did you mean 'train'?")
    assert_one_line(
        i3lm(*TRAIN, "--data.source", "no.txt", cwd=tmp_path),
        f"i3lm train: error: no.txt: no such file; give the path of {_KINDS} (pydocs, stories)",
    )
    assert_one_line(
        i3lm("generate", tiny_run, "--prompt", "x" * 33),
        "i3lm generate: error: the prompt has 33 tokens, and this model's context is 32: shorten "
        "the prompt",
    )
    assert_one_line(
        i3lm(
            "generate", tiny_run, "--prompt", "Once", "--context-overflow", "error",
            "--max-new-tokens", "29",
        ),
        "i3lm generate: error: the prompt has 4 tokens and 29 more are asked for, but this "
        "model's context is 32: shorten the prompt, ask for fewer, or set context_overflow to "
        "window or shift",
    )  # fmt: skip
    assert_one_line(
        i3lm("chat", tmp_path),
        f"i3lm chat: error: {tmp_path}: holds no model (no config.json); give a checkpoint folder "
        "or the output folder of a run; a checkpoint of open-i3 is read by `i3lm convert` first",
    )
    assert_one_line(
        i3lm("evaluate", tiny_run, "--data", "stories", "--size", "0"),
        "i3lm evaluate: error: size (0) must be at least 1 document; leave it out for all",
    )
    shutil.copytree(tiny_run / "best", tmp_path / "damaged")
    remove_tensors(tmp_path / "damaged")
    assert_one_line(
        i3lm("generate", "damaged", "--prompt", "a", cwd=tmp_path),
        "i3lm generate: error: damaged: the weights do not fit config.json: 2 tensors are "
        "missing or unknown, such as lm_head.weight",
    )


def test_debug_shows_the_traceback(i3lm: Process, tmp_path: Path):
    finished = i3lm("chat", tmp_path / "no", "--debug")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "CheckpointError" in finished.stderr


# No space


def resume_from_30(run: Path, tiny_run: Path) -> dict[str, str]:
    """Makes a folder as it was at step 30; gives the digests of its best model."""
    later = shutil.ignore_patterns("checkpoint-[456]0", "last")
    shutil.copytree(tiny_run, run, ignore=later)
    figures = run / "best" / "evaluation.json"  # any later model is then better
    figures.write_text(json.dumps({**json.loads(figures.read_text()), "loss": 99.0}))
    return snapshot(run / "best")


def assert_failed_save(
    finished: subprocess.CompletedProcess[str], run: Path, best: dict[str, str], reason: str
) -> None:
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    errors = [line for line in finished.stderr.splitlines() if "error:" in line]
    assert errors == [finished.stderr.splitlines()[-1]]
    assert errors[0].startswith("i3lm train: error: ")
    assert errors[0].endswith(reason)
    assert snapshot(run / "best") == best
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".old")]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}


# The weights take 40 kB, the optimizer's state 100 kB: the one stops in safetensors, which
# writes the best model at step 40, the other in PyTorch's archives, of the next checkpoint.
@pytest.mark.parametrize(
    ("limit", "save_every", "reason"),
    [
        (
            30_000,
            1000,
            "/best: cannot be written: the file grew past the size limit of this process; raise "
            "the limit (ulimit -f)",
        ),
        (
            60_000,
            10,
            "/checkpoints/checkpoint-40: cannot be written: no space is left on the disk, or for "
            "this process; free some or write elsewhere",
        ),
    ],
)
def test_file_size_limit(
    i3lm: Process, tiny_run: Path, tmp_path: Path, limit: int, save_every: int, reason: str
):
    run = tmp_path / "run"
    best = resume_from_30(run, tiny_run)
    finished = i3lm(
        "train", "--output", run, "--resume", *TINY_TRAINING,
        "--training.save_every", save_every,
        "--training.evaluate_every", 40 if save_every > 40 else 1000,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert_failed_save(finished, run, best, str(run) + reason)


def test_full_disk(i3lm: Process, tiny_run: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here; test_file_size_limit covers it")
    try:
        run = disk / "run"
        best = resume_from_30(run, tiny_run)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 32_000))
        finished = i3lm("train", "--output", run, "--resume", *TINY_TRAINING)
        assert_failed_save(
            finished,
            run,
            best,
            "no space is left on the disk, or for this process; free some or write elsewhere",
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
