from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from i3lm.cli import main
from i3lm.layers import CausalSelfAttention
from tests.conftest import TINY_MODEL, TINY_TRAINING, Process

pytestmark = pytest.mark.usefixtures("one_thread")


def read_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(run) if "loss" in r}


def held_out_losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["eval_loss"]) for r in read_records(run) if "eval_loss" in r]


def start(
    arguments: list[object], environment: dict[str, str], **settings
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "i3lm", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **settings})


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, "the process ended first"
        time.sleep(0.005)


def test_what_a_run_leaves(tiny_process: subprocess.CompletedProcess[str], tiny_run: Path):
    result = json.loads(tiny_process.stdout)  # nothing else stands on standard output
    assert result["steps"] == 60
    assert result["tokens"] == 60 * 8 * 32
    assert result["after"]["loss"] < result["before"]["loss"] - 0.5
    assert [sample["prompt"] for sample in result["samples"]] == ["Once upon a time"]
    assert "Traceback" not in tiny_process.stderr
    assert re.search(r"new model: [\d,]+ parameters, vocabulary \d+, context 32, fp32 on cpu",
                     tiny_process.stderr)  # fmt: skip
    assert re.search(r"step +60/60  loss \d\.\d{3}  [\d,]+ tokens/s  0:00:00 left",
                     tiny_process.stderr)  # fmt: skip
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {
        "best", "last", "checkpoints", "config.yaml", "metrics.jsonl", "samples.jsonl"
    }  # fmt: skip
    samples = [json.loads(line) for line in (tiny_run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [30, 60]


def test_metrics(tiny_run: Path):
    records = read_records(tiny_run)
    assert list(losses(tiny_run)) == list(range(1, 61))
    assert [step for step, _ in held_out_losses(tiny_run)] == [0, 20, 40, 60]
    last = next(r for r in reversed(records) if "loss" in r)
    assert last["tokens"] == 60 * 8 * 32
    assert last["tokens_per_second"] > 0
    for name in ("current", "smoothed", "windowed", "best"):
        assert last[f"perplexity_{name}"] > 1
    values = list(losses(tiny_run).values())
    assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 0.5


def test_killed_and_resumed_run_equals_a_straight_one(
    i3lm: Process, process_environment: dict[str, str], tiny_run: Path, tmp_path: Path
):
    run = tmp_path / "run"
    process = start(["train", "--output", run, *TINY_TRAINING], process_environment)
    wait_for(run / "checkpoints" / "checkpoint-20" / "trainer_state.json", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "last").exists()

    resumed = i3lm("train", "--output", run, "--resume", "--json", *TINY_TRAINING)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search("resuming from .*/checkpoint-[2-5]0\n", resumed.stderr)
    assert_same_run(run, tiny_run)
    result = json.loads(resumed.stdout)
    assert (result["steps"], result["tokens"]) == (60, 60 * 8 * 32)


def assert_same_run(run: Path, straight: Path) -> None:
    """Bit for bit the same weights, losses and samples, and no step twice."""
    for part in ("best", "last"):
        weights, expected = (load_file(f / part / "model.safetensors") for f in (run, straight))
        assert weights.keys() == expected.keys()
        assert all(weights[name].equal(expected[name]) for name in expected)
    assert [(r["step"], "loss" in r) for r in read_records(run)] == [
        (r["step"], "loss" in r) for r in read_records(straight)
    ]
    assert losses(run) == losses(straight)
    assert held_out_losses(run) == held_out_losses(straight)
    assert (run / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_resuming_in_the_second_epoch(tiny_run: Path, tmp_path: Path):
    epoch = {r["step"]: r["epoch"] for r in read_records(tiny_run)}
    assert 1 < epoch[50] < 2
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoint-60", "best", "last"))
    # What a process that was killed while it wrote leaves behind.
    (run / "checkpoints" / "checkpoint-55").mkdir()
    (run / "checkpoints" / "checkpoint-56").mkdir()
    (run / "checkpoints" / "checkpoint-56" / "trainer_state.json").write_text('{"global_')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 0
    assert_same_run(run, tiny_run)
    steps = {path.name for path in (run / "checkpoints").iterdir()}
    assert steps == {f"checkpoint-{step}" for step in range(10, 70, 10)}


def test_resuming_a_finished_run_changes_nothing(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 0
    assert losses(run) == losses(tiny_run)


def test_intervals_may_change_when_resuming(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoint-60"))
    changed = ["--training.log_every", "5", "--training.evaluate_every", "4"]
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING, *changed]) == 0
    assert [step for step in losses(run) if step > 50] == [55, 60]
    assert [step for step, _ in held_out_losses(run) if step > 50] == [52, 56, 60]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["training"]["evaluate_every"] == 4


def test_resuming_before_the_first_checkpoint_repeats_no_sample(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoints", "last"))
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING]) == 0
    assert_same_run(run, tiny_run)


def test_a_resumed_run_keeps_a_better_model_that_it_does_not_meet_again(
    tiny_run: Path, tmp_path: Path
):
    run = tmp_path / "run"
    # It was killed after step 60, where it evaluated, and before it saved checkpoint 60.
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoint-60", "last"))
    best = run / "best" / "evaluation.json"
    kept = json.loads(best.read_text())
    assert kept["loss"] == min(loss for _, loss in held_out_losses(tiny_run))
    best.write_text(json.dumps({**kept, "loss": kept["loss"] / 2}))  # a loss never met again
    weights = (run / "best" / "model.safetensors").read_bytes()
    changed = ["--training.evaluate_every", "55"]
    assert main(["train", "--output", str(run), "--resume", *TINY_TRAINING, *changed]) == 0
    assert [step for step, _ in held_out_losses(run) if step > 50] == [55, 60]
    assert (run / "best" / "model.safetensors").read_bytes() == weights


def test_a_model_tells_its_figures(tiny_run: Path):
    for part in ("best", "last"):
        figures = json.loads((tiny_run / part / "evaluation.json").read_text())
        record = next(
            r for r in read_records(tiny_run) if r["step"] == figures["step"] and "eval_loss" in r
        )
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert figures[name] == record[f"eval_{name}"]


def test_gradient_checkpointing(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    passes = 0

    def count(self, *arguments, **settings):
        nonlocal passes
        passes += self.training
        return forward(self, *arguments, **settings)

    forward = CausalSelfAttention.forward
    monkeypatch.setattr(CausalSelfAttention, "forward", count)
    run = tmp_path / "run"
    options = ["--training.gradient-checkpointing", "true", "--training.max-steps", "4"]
    assert main(["train", "--output", str(run), *TINY_TRAINING, *options]) == 0
    assert passes == 4 * 2  # the one layer of attention is computed once more for its gradients
    # The same operations on the same numbers, computed twice; the rate is still warming up.
    assert losses(run) == {step: losses(tiny_run)[step] for step in range(1, 5)}


@pytest.mark.slow
def test_compile(i3lm: Process, tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ["--training.compile", "true", "--training.max_steps", "4"]
    finished = i3lm("train", "--output", run, *TINY_TRAINING, *options, timeout=250)
    assert finished.returncode == 0, finished.stderr
    for step, loss in losses(run).items():
        # Fused operations round elsewhere; four steps of Adam at 0.01 carry that on.
        assert loss == pytest.approx(losses(tiny_run)[step], abs=1e-3)
    # The saved model is the plain one.
    assert main(["generate", str(run), "--prompt", "Once", "--max-new-tokens", "5"]) == 0


def test_compiling_without_a_compiler(
    i3lm: Process, process_environment: dict[str, str], tmp_path: Path
):
    options = ["--training.compile", "true", "--training.max_steps", "1"]
    # An empty cache, and nothing in the path.
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    finished = i3lm(
        "train", "--output", tmp_path / "run", *TINY_TRAINING, *options,
        env={**process_environment, **environment},
    )  # fmt: skip
    assert finished.returncode == 2
    last_line = finished.stderr.splitlines()[-1]
    assert last_line.startswith("i3lm train: error: training.compile: torch.compile failed (")
    assert last_line.endswith("); leave it out, or give it the C++ compiler that it needs on a CPU")
    assert "Traceback" not in finished.stderr


PEERS = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "max_position_embeddings": 32},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "num_heads": 4,
               "head_dim": 8, "n_groups": 1},
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 32},
}  # fmt: skip


@pytest.mark.parametrize("model_type", PEERS)
def test_a_peer_of_another_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
):
    run = tmp_path / "run"
    config = json.dumps({"model_type": model_type, **PEERS[model_type]})
    options = ["--training.max_steps", "10", "--training.context_length", "32"]
    options += ["--sample.every", "0", "--sample.max_new_tokens", "5", "--model.config", config]
    assert main(["train", "--output", str(run), "--json", *TINY_TRAINING, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.1
    assert f"A {model_type} model" in (run / "best" / "README.md").read_text()
    assert main(["generate", str(run), "--prompt", "Once", "--max-new-tokens", "5"]) == 0


def test_reader_that_goes_away(process_environment: dict[str, str]):
    for arguments in (["models"], ["train", "--help"], ["--help"]):
        process = start(arguments, process_environment)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(timeout=60) in (0, 1)  # rich's choice is 1


def test_terminal_shows_a_bar_that_samples_do_not_tear(
    process_environment: dict[str, str], tmp_path: Path
):
    master, slave = pty.openpty()
    options = ["--sample.every", "10"]
    process = start(
        ["train", "--output", tmp_path / "run", *TINY_TRAINING, *options],
        {**process_environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += (part := os.read(master, 65536))
        except OSError:  # Linux's way to say that the other side has closed
            break
        if not part:
            break
    os.close(master)
    process.communicate(timeout=60)
    assert process.returncode == 0
    text = shown.decode()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor comes back
    # Once the control sequences are out, each permanent line stands alone.
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")
    assert [
        line for line in plain if re.search(r"60/60 loss \d\.\d{3} [\d,]+ tokens/s 0:00:0\d", line)
    ]
    samples = [line for line in plain if "sample:" in line]
    assert [line[:11] for line in samples] == [f"step {step:>6}" for step in range(10, 70, 10)]
    assert not [line for line in samples if "tokens/s" in line]


def test_run_from_its_own_config(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = ["--training.max_steps", "2", "--sample.every", "0"]
    config = str(tiny_run / "config.yaml")
    assert main(["train", "--config", config, "--output", str(run), *options]) == 0
    saved, expected = (yaml.safe_load((f / "config.yaml").read_text()) for f in (run, tiny_run))
    assert saved["model"] == expected["model"] == {"source": None, "config": TINY_MODEL}
    assert saved["training"] == {**expected["training"], "max_steps": 2}


def test_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "\n<|endoftext|>\n".join(f"a tiny text with the number {n}" for n in range(40))
    (tmp_path / "text.txt").write_text(text)
    arguments = [
        *TINY_TRAINING, "--output", str(tmp_path / "run"), "--json",
        "--data.source", str(tmp_path / "text.txt"), "--training.batch_size", "4",
        "--training.max_steps", "null", "--training.epochs", "2", "--sample.every", "0",
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    epoch = read_records(tmp_path / "run")[-1]["epoch"]
    assert epoch <= 2 < epoch * (1 + 1 / result["steps"])  # one step more would be too many
    assert result["tokens"] == result["steps"] * 4 * 32


def test_tokens_of_a_text_smaller_than_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "\n<|endoftext|>\n".join(f"the number {n}" for n in range(12))
    (tmp_path / "text.txt").write_text(text)
    arguments = [
        *TINY_TRAINING, "--output", str(tmp_path / "run"), "--json",
        "--data.source", str(tmp_path / "text.txt"), "--data.held_out_fraction", "0.3",
        "--training.max_steps", "2", "--sample.every", "0",
    ]  # fmt: skip
    assert main(["train", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 2 * 8 * 32  # it is read again until the batch is full


@pytest.mark.parametrize(
    "options",
    [
        ["--training.precision", "bf16"],
        ["--tokenizer.source", "bpe", "--tokenizer.vocab_size", "300"],
        ["--tokenizer.source", "chunk", "--tokenizer.vocab_size", "200"],
        ["--tokenizer.lowercase", "true"],
        ["--model.source", "i3-tiny", "--tokenizer.source", "null"],
    ],
    ids=["bf16", "bpe", "chunk", "lowercase", "preset"],
)
def test_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]):
    run = tmp_path / "run"
    arguments = [*TINY_TRAINING, "--training.max_steps", "25", "--sample.every", "0", *options]
    assert main(["train", "--output", str(run), "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.2


def test_fine_tuning(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from i3lm.tokenizers import load_tokenizer, tokenizer_fingerprint

    # Words the first run never saw in this order, in the characters that it knows.
    text = "\n<|endoftext|>\n".join("the meadow was little and old " * n for n in range(2, 30))
    (tmp_path / "other.txt").write_text(text)
    run = tmp_path / "run"
    arguments = [
        "train", "--output", str(run), "--json", "--model.source", str(tiny_run),
        "--data.source", str(tmp_path / "other.txt"), "--data.held_out_fraction", "0.2",
        *TINY_TRAINING[-22:], "--training.max_steps", "20", "--sample.every", "0",
    ]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["loss"] < result["before"]["loss"] - 0.3
    before, after = (load_tokenizer(folder / "best") for folder in (tiny_run, run))
    assert tokenizer_fingerprint(before) == tokenizer_fingerprint(after)
    configs = [json.loads((f / "best" / "config.json").read_text()) for f in (tiny_run, run)]
    assert configs[0]["tokenizer_fingerprint"] == configs[1]["tokenizer_fingerprint"]

    message = r"model.config \(hidden_size\) cannot change the checkpoint .*: leave it out"
    assert main([*arguments, "--model.config.hidden_size", "8", "--overwrite"]) == 2
    assert re.search(message, capsys.readouterr().err)
    other = ["--tokenizer.source", "bpe", "--tokenizer.vocab_size", "300", "--overwrite"]
    assert main([*arguments, *other]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert (run / "best").is_dir()  # nothing was overwritten


def test_divergence_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--training.learning_rate", "1e30", "--training.max_grad_norm", "0"]
    options += ["--training.warmup_steps", "0", "--sample.every", "0"]
    run = tmp_path / "run"
    assert main(["train", "--output", str(run), *TINY_TRAINING, *options]) == 2
    assert re.search(
        r"i3lm train: error: step \d+: the gradient is not finite: .*(output|finite|sum); no "
        r"checkpoint was saved before: begin another run with a training.learning_rate below "
        r"1e\+30\n$",
        capsys.readouterr().err,
    )
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_seed_decides_the_run(tiny_run: Path, tmp_path: Path):
    options = ["--sample.every", "0", "--training.max_steps", "3"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = ["train", "--output", str(tmp_path / name), *TINY_TRAINING, *options]
        assert main([*arguments, "--training.seed", seed]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_accumulated_halves_equal_a_full_batch(tmp_path: Path):
    weights = []
    for batch, accumulation in ((8, 1), (4, 2)):
        run = tmp_path / str(batch)
        options = [
            "--training.max_steps", "5", "--sample.every", "0",
            "--training.batch_size", str(batch),
            "--training.gradient_accumulation_steps", str(accumulation),
        ]  # fmt: skip
        assert main(["train", "--output", str(run), *TINY_TRAINING, *options]) == 0
        weights.append(load_file(run / "last" / "model.safetensors"))
    # Sums of float32 in another order, through five steps of Adam at a rate of 0.01.
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).abs().max() < 1e-3, name
    first, second = (losses(tmp_path / str(batch)) for batch in (8, 4))
    assert all(abs(first[step] - second[step]) < 1e-4 for step in first)
