"""What our trainer relies on in transformers' own, part of which is private there."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, default_data_collator

from i3lm.data.tokens import ContiguousRows, TokenizedText
from i3lm.models.i3 import I3Config, I3ForCausalLM
from i3lm.training.arguments import training_arguments
from i3lm.training.checkpoints import verify_checkpoint
from i3lm.training.guards import NonFiniteError
from i3lm.training.metrics import StepTimer
from i3lm.training.options import TrainingOptions
from i3lm.training.trainer import I3Trainer

# Method -> the parameters that it has in the versions of transformers that we were written for.
OVERRIDDEN = {
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "get_train_dataloader": [],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "set_initial_training_values": ["args", "dataloader"],
    "_get_grad_norm": ["model", "grad_norm"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint",
        "trial",
    ],
    "_run_epoch": [
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch",
        "trial", "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_issue_warnings_after_load": ["load_result"],
    "_load_scaler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
}  # fmt: skip

OURS = {
    "__init__", "state_dict", "load_state_dict", "skip_data", "_skip", "_check_tokenizer",
    "_scaler_still_adapts",
}  # fmt: skip


def test_our_own_methods_hide_none_of_the_trainers():
    assert not [name for name in OURS - {"__init__"} if hasattr(Trainer, name)]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_as_we_know_it(name: str):
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == OVERRIDDEN[name]


def test_everything_that_is_overridden_is_listed():
    own = {name for name in vars(I3Trainer) if inspect.isfunction(vars(I3Trainer)[name])}
    assert own - OURS == set(OVERRIDDEN)


class Reader:
    """Something that a checkpoint keeps, with a count and a tensor."""

    def __init__(self) -> None:
        self.saves, self.loaded, self.skipped = 0, [], []

    def state_dict(self) -> dict:
        self.saves += 1
        return {"cursor": {"stories": [self.saves, 0.1]}, "carried": torch.full((2,), self.saves)}

    def load_state_dict(self, state: dict) -> None:
        self.loaded.append(state)

    def skip_batches(self, batches: int) -> None:
        self.skipped.append(batches)


def make_trainer(folder: Path, reader: Reader) -> I3Trainer:
    options = TrainingOptions(
        max_steps=6, batch_size=2, save_every=2, evaluate_every=100, gradient_accumulation_steps=2,
        precision="fp32",
    )  # fmt: skip
    text = TokenizedText(np.arange(401, dtype=np.uint16) % 16, documents=1, bytes=401)
    rows = ContiguousRows(text, 8)
    torch.manual_seed(0)
    config = I3Config(
        vocab_size=16, hidden_size=8, num_attention_heads=2, layer_types=["linear_attention"]
    )
    arguments = training_arguments(
        folder, options, "fp32", torch.device("cpu"), len(rows), resumed=True
    )
    return I3Trainer(
        model=I3ForCausalLM(config), args=arguments, train_dataset=rows, held_out=text,
        context_length=8, precision="fp32", timer=StepTimer(1),
        data_collator=default_data_collator, stateful={"data": reader}, configuration="a: b\n",
    )  # fmt: skip


def test_what_is_registered_is_kept_given_back_and_skips(tmp_path: Path):
    reader = Reader()
    make_trainer(tmp_path, reader).train()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    verify_checkpoint(checkpoint)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "config.json", "config.yaml", "data.json", "data.safetensors", "generation_config.json",
        "manifest.json", "model.safetensors", "optimizer.pt", "progress.json", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    assert (checkpoint / "config.yaml").read_text() == "a: b\n"
    resumed = Reader()
    trainer = make_trainer(tmp_path, resumed)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    (state,) = resumed.loaded
    assert state["cursor"] == {"stories": [2, 0.1]}
    assert state["carried"].equal(torch.full((2,), 2))
    assert resumed.skipped == []

    # Step 6 went wrong: behind the checkpoint of step 4 the data of two steps are passed over.
    trainer.skip_data(6)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.skipped == [2 * 2]
    saved = json.loads((tmp_path / "checkpoints" / "checkpoint-6" / "progress.json").read_text())
    assert saved["skipped_steps"] == 2
    # And once more, at step 5: its data and that of the two before are the same as steps 5 to 7.
    trainer.skip_data(5)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.skipped == [4, 3 * 2]


def give_scaler(trainer: I3Trainer, scale: float) -> torch.amp.GradScaler:
    """Gives the loss scaler that accelerate makes on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return trainer.accelerator.scaler


def test_loss_scaling_adapts_and_is_resumed(tmp_path: Path):
    trainer = make_trainer(tmp_path, Reader())
    # Overflows in float32 until it has been halved a few times; those steps are left out.
    scaler = give_scaler(trainer, 2.0**128 - 2.0**104)
    trainer.train()
    state = torch.load(tmp_path / "checkpoints" / "checkpoint-4" / "scaler.pt", weights_only=True)
    assert state["scale"] < 2.0**128 - 2.0**104
    assert trainer.state.global_step == 6
    last = scaler.state_dict()

    trainer = make_trainer(tmp_path, Reader())
    scaler = give_scaler(trainer, 1.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    assert scaler.state_dict() == last


def test_loss_scaling_does_not_hide_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(tmp_path, Reader())
    give_scaler(trainer, 4.0)
    loss = I3Trainer.compute_loss
    monkeypatch.setattr(I3Trainer, "compute_loss", lambda *a, **k: loss(*a, **k) * torch.nan)
    # Halved to 2, 1 and a half, which no number that overflows would need.
    with pytest.raises(NonFiniteError, match=r"^step 4: .* the gradient of lm_head.bias is"):
        trainer.train()
