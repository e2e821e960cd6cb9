"""What our trainer relies on in transformers' own, part of which is private there."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

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
