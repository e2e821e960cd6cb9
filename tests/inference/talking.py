"""Holds a conversation in a process of its own; run by test_sessions.py.

Arguments: pairs of a checkpoint and a session file. Says one more turn in each session and writes
the logits that this took beside it, as FILE.logits.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference.loading import load_checkpoint
from i3lm.inference.sessions import Session

OPTIONS = SamplingOptions(6, 1.0, seed=3)


def record(generator: TextGenerator) -> list[torch.Tensor]:
    """A list that gets the hidden states and then the logits of every step from now on."""
    seen: list[torch.Tensor] = []
    generator.model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.extend([inputs[0].clone(), output.clone()])
    )
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    for checkpoint, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        generator = TextGenerator(*load_checkpoint(checkpoint))
        session = Session.load(file, generator)
        seen = record(generator)
        session.say("and then", OPTIONS)
        save_file({str(i): step for i, step in enumerate(seen)}, f"{file}.logits")
