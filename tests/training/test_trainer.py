"""What our trainer relies on in transformers' own, part of which is private there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from i3lm.data.rows import RowBatches
from i3lm.data.streams import ShuffledDocuments
from i3lm.data.tokens import TokenizedText
from i3lm.models.i3 import I3Config, I3ForCausalLM
from i3lm.ops.dispatch import use_implementation
from i3lm.training.arguments import training_arguments
from i3lm.training.checkpoints import load_state, verify_checkpoint
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
    "log": ["logs", "start_time"],
    "set_initial_training_values": ["args", "dataloader"],
    "_clip_grad_norm": ["model"],
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
    "_defer_fsdp_gradient_reduction": [],
    "_save": ["output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["output_dir"],
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
    "_scaler_still_adapts", "_end_with_the_data", "_find_non_finite",
    "_one_pass_optimizer", "_sums_no_gradients",
}  # fmt: skip


def test_our_own_methods_hide_none_of_the_trainers():
    assert not [name for name in OURS - {"__init__"} if hasattr(Trainer, name)]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_as_we_know_it(name: str):
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == OVERRIDDEN[name]


def test_everything_that_is_overridden_is_listed():
    own = {name for name in vars(I3Trainer) if inspect.isfunction(vars(I3Trainer)[name])}
    assert own - OURS == set(OVERRIDDEN)


def test_the_end_of_the_data_is_handled_as_the_trainer_handles_a_step():
    names = list(inspect.signature(Trainer._maybe_log_save_evaluate).parameters)[1:]
    assert names == [
        "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time",
        "learning_rate",
    ]  # fmt: skip


class Reader:
    """Something that a checkpoint keeps, with a count and a tensor, and that can skip."""

    def __init__(self) -> None:
        self.saves, self.loaded, self.skipped = 0, [], []

    def state_dict(self) -> dict:
        self.saves += 1
        return {"cursor": {"stories": [self.saves, 0.1]}, "seen": torch.full((2,), self.saves)}

    def load_state_dict(self, state: dict) -> None:
        self.loaded.append(state)

    def skip_batches(self, batches: int) -> None:
        self.skipped.append(batches)


class Store:
    """Documents of 16 different tokens, some of them with the places that are to be learnt."""

    fingerprint = "16 tokens"

    def __init__(self, lengths: Sequence[int], masks: Sequence[np.ndarray | None] = ()) -> None:
        generator = np.random.default_rng(0)
        self.texts = [generator.integers(16, size=n, dtype=np.uint16) for n in lengths]
        self.masks = masks or [None] * len(lengths)
        self.documents, self.tokens = len(lengths), sum(lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.texts[document][start:stop]

    def read_mask(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> np.ndarray | None:
        mask = self.masks[document]
        return None if mask is None else mask[start:stop]


class Recorder(I3Trainer):
    """A trainer that keeps what it trains on, and the losses."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.seen: list[torch.Tensor] = []
        self.losses: list[float] = []

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        self.seen.append(inputs["input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss


def make_trainer(
    folder: Path,
    reader: Reader | None = None,
    *,
    rows: str = "stream",
    store: Store | None = None,
    epochs: int | None = None,
    model: I3ForCausalLM | None = None,
    precision: str = "fp32",
    **changes,
) -> Recorder:
    options = TrainingOptions(**{
        "max_steps": 6, "batch_size": 2, "save_every": 2, "evaluate_every": 100,
        "gradient_accumulation_steps": 2, "precision": precision,
        "learning_rate": 1e-3, "warmup_steps": 0, **changes,
    })  # fmt: skip
    held_out = TokenizedText(
        np.arange(41, dtype=np.uint16) % 16, documents=1, bytes=40, lengths=np.array([40])
    )
    documents = ShuffledDocuments(store or Store([30, 50, 20, 60]), "store", 0, epochs=epochs)
    arguments = training_arguments(
        folder, options, precision, torch.device("cpu"), max_steps=options.max_steps, resumed=True
    )
    return Recorder(
        model=model or make_model(), args=arguments, held_out=held_out, precision=precision,
        rows=RowBatches(documents, rows, context_length=8, batch_size=options.batch_size),
        timer=StepTimer(1), stateful={"reader": reader} if reader else None,
        configuration="a: b\n",
    )  # fmt: skip


def make_model() -> I3ForCausalLM:
    torch.manual_seed(0)
    config = I3Config(
        vocab_size=16, hidden_size=8, num_attention_heads=2, layer_types=["linear_attention"]
    )
    return I3ForCausalLM(config)


WIDE = {(torch.float32, torch.strided)}
SMALL = WIDE | {(torch.bfloat16, torch.strided), (torch.float32, torch.sparse_coo)}


class GradientTypes(TrainerCallback):
    """Collects the dtypes and layouts of the gradients of every step."""

    def __init__(self) -> None:
        self.seen: set[tuple[torch.dtype, torch.layout]] = set()

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.seen |= {(p.grad.dtype, p.grad.layout) for p in model.parameters()}


def test_gradients_stay_small_where_none_are_summed_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights after six steps are the same bit for bit; a sum of gradients is dense float32."""
    weights = []
    for small in (True, False):
        if not small:
            monkeypatch.setattr("i3lm.training.trainer.leave_gradients_small", lambda model: None)
        trainer = make_trainer(
            tmp_path / str(small), precision="bf16", gradient_accumulation_steps=1
        )
        trainer.add_callback(types := GradientTypes())
        trainer.train()
        assert types.seen == (SMALL if small else WIDE)
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert weights[0].equal(weights[1])
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "summed", precision="bf16", gradient_accumulation_steps=2)
    trainer.add_callback(types := GradientTypes())
    trainer.train()
    assert types.seen == WIDE


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}"


def test_what_is_registered_is_kept_and_given_back(tmp_path: Path):
    make_trainer(tmp_path, Reader()).train()
    checkpoint = checkpoint_of(tmp_path, 4)
    verify_checkpoint(checkpoint)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "carried_state.json", "carried_state.safetensors", "config.json", "config.yaml",
        "data.json", "generation_config.json", "manifest.json", "model.safetensors",
        "optimizer.pt", "progress.json", "reader.json", "reader.safetensors", "rng_state.pth",
        "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    assert (checkpoint / "config.yaml").read_text() == "a: b\n"
    assert load_state(checkpoint, "data")["batches"] == 4 * 2
    resumed = Reader()
    make_trainer(tmp_path, resumed).train(resume_from_checkpoint=str(checkpoint))
    (state,) = resumed.loaded
    assert state["cursor"] == {"stories": [2, 0.1]}
    assert state["seen"].equal(torch.full((2,), 2))
    assert resumed.skipped == []


def test_data_that_led_to_a_bad_step_are_passed_over(tmp_path: Path):
    straight = make_trainer(tmp_path / "straight", max_steps=10)
    straight.train()
    reader = Reader()
    make_trainer(tmp_path, reader).train()
    checkpoint = str(checkpoint_of(tmp_path, 4))
    trainer = make_trainer(tmp_path, reader)

    def goes_on_from(batch: int) -> None:
        expected = straight.seen[batch : batch + 4]
        assert all(a.equal(b) for a, b in zip(trainer.seen[-4:], expected, strict=True))
        assert len(trainer.seen) % 4 == 0

    # Step 6 went wrong: behind the checkpoint of step 4 the data of two steps are passed over.
    trainer.skip_data(6)
    trainer.train(resume_from_checkpoint=checkpoint)
    goes_on_from(6 * 2)
    assert reader.skipped == [2 * 2]
    assert load_state(checkpoint_of(tmp_path, 6), "progress")["skipped_steps"] == 2
    # And once more, at step 5: its data and that of the two before are the same as steps 5 to 7.
    trainer.skip_data(5)
    trainer.train(resume_from_checkpoint=checkpoint)
    goes_on_from(7 * 2)
    assert reader.skipped == [4, 3 * 2]


def give_scaler(trainer: I3Trainer, scale: float) -> torch.amp.GradScaler:
    """Gives the loss scaler that accelerate makes on a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return trainer.accelerator.scaler


def test_loss_scaling_adapts_and_is_resumed(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    # Overflows in float32 until it has been halved a few times; those steps are left out.
    scaler = give_scaler(trainer, 2.0**128 - 2.0**104)
    trainer.train()
    state = torch.load(checkpoint_of(tmp_path, 4) / "scaler.pt", weights_only=True)
    assert state["scale"] < 2.0**128 - 2.0**104
    assert trainer.state.global_step == 6
    last = scaler.state_dict()

    trainer = make_trainer(tmp_path)
    scaler = give_scaler(trainer, 1.0)
    trainer.train(resume_from_checkpoint=str(checkpoint_of(tmp_path, 4)))
    assert scaler.state_dict() == last


def test_loss_scaling_does_not_hide_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = make_trainer(tmp_path)
    give_scaler(trainer, 4.0)
    loss = I3Trainer.compute_loss
    monkeypatch.setattr(I3Trainer, "compute_loss", lambda *a, **k: loss(*a, **k) * torch.nan)
    # Halved to 2, 1 and a half, which no number that overflows would need.
    with pytest.raises(NonFiniteError, match=r"^step 4: .* the gradient of lm_head.bias is"):
        trainer.train()


class GradientKeeper(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}


# Which of 66 tokens are to be learnt: 3 labels of the first batch, and 14 of the second; or none
# of the first.
CHAT = [np.isin(np.arange(66), [5, 9, 14, *range(17, 31)])]
NOTHING_IN_THE_FIRST = [np.arange(66) > 20]


@pytest.mark.parametrize("rows", ["contiguous", "packed"])
@pytest.mark.parametrize("mask", [CHAT, NOTHING_IN_THE_FIRST], ids=["few", "none at first"])
def test_every_learnt_label_of_a_step_counts_the_same(tmp_path: Path, mask: list, rows: str):
    """Two batches of a step, with different numbers of learnt labels, are as one of both."""
    model = make_model().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keeper = GradientKeeper()
    trainer = make_trainer(
        tmp_path, rows=rows, store=Store([66], mask), model=model, max_steps=1, max_grad_norm=0
    )
    trainer.add_callback(keeper)
    with use_implementation(wkv="scan", cross_entropy="reference"):
        trainer.train()

    model.load_state_dict(before)
    whole = make_trainer(tmp_path, rows=rows, store=Store([66], mask), model=model, batch_size=4)
    batch = next(whole.rows)
    learnt = (batch["labels"] != -100).sum(dim=1)
    assert learnt[:2].sum() != learnt[2:].sum() > 0
    model.zero_grad()
    logits = model(batch["input_ids"], reset=batch.get("reset")).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    assert sum(trainer.losses) == pytest.approx(loss.item(), rel=1e-12)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        # Sums of 32 terms in another order, at 2e-16 each.
        torch.testing.assert_close(
            keeper.gradients[name], parameter.grad, rtol=1e-11, atol=1e-13, msg=name
        )


def test_a_step_of_prompts_alone_changes_no_gradient(tmp_path: Path):
    keeper = GradientKeeper()
    trainer = make_trainer(tmp_path, store=Store([66], [np.zeros(66, bool)]), max_steps=1)
    trainer.add_callback(keeper)
    trainer.train()
    assert trainer.losses == [0, 0]
    assert all(not gradient.any() for gradient in keeper.gradients.values())
