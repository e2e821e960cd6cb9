"""Conversations that keep the model's state, so that a turn costs only its new tokens.

A session holds the tokens said so far and the model's state after all but the last of them. A
recurrent state cannot be taken back a step, so a copy of it is kept at the start of every turn:
its size does not depend on the conversation's length, and `Session.rewind` restores it exactly.
Keys and values of attention layers only grow, so rewinding cuts them.

Where the tokenizer has a chat template, a session is a conversation by it: a turn asks as the
template does, and the model answers. What was said is never written again, so here, too, a turn
adds only what is new. Without a template a session is one text, of which each turn is a line.

Where the state does not cover the conversation (it outgrew the model's context, or the turn that
would have computed it was interrupted), the next turn computes it again from the tokens, under
the rules of the model's `generate`; what was said is never lost.

A saved session is one safetensors file: the tokens, the states, and as metadata the format, its
version, the turns' texts, and the fingerprints of the model, the tokenizer, the chat template and
the content.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from i3lm.errors import GenerationError, SessionError
from i3lm.files import write_file
from i3lm.inference.generation import Completion, SamplingOptions, TextGenerator
from i3lm.models.i3 import I3Cache, I3Config
from i3lm.models.i3.cache_i3 import write_state
from i3lm.tokenizers import tokenizer_fingerprint, write_question

FORMAT = "i3lm-session"
VERSION = "1"

# What a configuration says that does not change what the model computes.
_WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")

# The model's state by name: "LAYER.keys", "LAYER.values", "LAYER.states.SLOT".
States = dict[str, Tensor]


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
        start: Number of tokens said before it.
        prompt: What the person wrote.
        reply: What the model added.
    """

    start: int
    prompt: str
    reply: str


def model_fingerprint(model: PreTrainedModel) -> str:
    """Gives a hex digest that two models share if they compute the same.

    It is the SHA-256 of the configuration and of every weight. Reading them all costs about as
    much as loading them did (0.4 s for 170 million float32 parameters); a sample would miss an
    edited or merged layer.
    """
    config = model.config.to_diff_dict()
    digest = hashlib.sha256(
        json.dumps(
            {key: config[key] for key in sorted(config) if key not in _WITHOUT_EFFECT}, default=str
        ).encode()
    )
    _digest_tensors(digest, model.state_dict())
    return digest.hexdigest()


class Session:
    """A conversation with a model.

    Args:
        generator: The model and tokenizer that talk.
        fingerprint: The model's `model_fingerprint`, if it is known already.

    Attributes:
        tokens: Everything that was said.
        turns: The exchanges.
        template: Fingerprint of the chat template that asks; empty where a text is continued.
    """

    def __init__(self, generator: TextGenerator, fingerprint: str | None = None) -> None:
        self.generator = generator
        self.fingerprint = fingerprint or model_fingerprint(generator.model)
        self.tokens: list[int] = []
        self.turns: list[Turn] = []
        self.template = _template_fingerprint(generator.tokenizer)
        # Covers every token but the last, or is None where it does not.
        self._cache: Cache | None = None
        # What could not be cut out of the cache at each turn's start.
        self._marks: list[States] = []

    @torch.inference_mode()
    def say(
        self, text: str, options: SamplingOptions, streamer: BaseStreamer | None = None
    ) -> Completion:
        """Adds a turn: the text, after all that was said before, and the model's reply.

        The text is a question by the chat template. Where there is none it starts a new line,
        unless the model ended its last reply as a document.

        Args:
            text: What to say.
            options: How to draw the reply.
            streamer: Receives the tokens as they come.

        Raises:
            GenerationError: The text cannot be a prompt; the session is as it was.
        """
        ids = [*self.tokens, *self.encode_turn(text)]
        mark = {} if self._cache is None else _recurrent(cache_states(self._cache))
        mark = {name: state.clone() for name, state in mark.items()}  # generation writes over them
        # Until the turn has ended well, the state is that of no known number of tokens.
        cache, self._cache = self._cache, None
        started = time.perf_counter()
        output = self.generator.generate_ids(ids, options, cache, streamer)
        seconds = time.perf_counter() - started
        tokens = output.sequences[0].tolist()
        self._cache = _in_step(output.cache, len(tokens))
        new = tokens[len(ids) :]
        reply = self.generator.tokenizer.decode(new, skip_special_tokens=True)
        self.turns.append(Turn(len(self.tokens), text, reply))
        self._marks.append(mark)
        self.tokens = tokens
        return Completion(text, reply, len(ids) - self.turns[-1].start, len(new), seconds)

    def encode_turn(self, text: str) -> list[int]:
        """The ids that a text adds to the conversation.

        Raises:
            GenerationError: It has none, more than the model's context, or is not UTF-8.
            TokenizerError: The chat template refuses it.
        """
        if self.template:
            return self._encode_question(text)
        goes_on = self.tokens and self.tokens[-1] != self.generator.tokenizer.eos_token_id
        return self._encode(self._separator() + text if goes_on else text)

    def _encode_question(self, text: str) -> list[int]:
        """What is missing at the end of the last reply, and the question."""
        roles = (("user", "prompt"), ("assistant", "reply"))
        said = [{"role": r, "content": getattr(t, n)} for t in self.turns for r, n in roles]
        ending, question = write_question(text, self.generator.tokenizer, said)
        missing = self.generator.tokenizer(ending, add_special_tokens=False)["input_ids"]
        for written in range(len(missing), 0, -1):
            if self.tokens[-written:] == missing[:written]:  # by the model itself
                missing = missing[written:]
                break
        return missing + self._encode(question)

    def _encode(self, text: str) -> list[int]:
        """The ids of a text, which begins a document where nothing was said before."""
        ids = self.generator.encode_prompt(text)
        begins = not self.tokens or self.generator.tokenizer.eos_token_id is None
        return ids if begins else ids[1:]

    def rewind(self, turns: int = 1) -> None:
        """Makes the last turns unsaid.

        Raises:
            GenerationError: There are not so many turns.
        """
        if not 1 <= turns <= len(self.turns):
            raise GenerationError(
                f"cannot go back {turns} turns: the session has {len(self.turns)}; give a number "
                "from 1 to that"
            )
        kept = len(self.turns) - turns
        start, mark = self.turns[kept].start, self._marks[kept]
        grown, self._cache = self._state(), None
        recurrent = _recurrent(grown)
        # The mark is empty where the state did not cover the conversation at the turn's start.
        if grown and start > 0 and mark.keys() == recurrent.keys():
            cut = {n: s[..., : start - 1, :] for n, s in grown.items() if n not in recurrent}
            self._cache = _cache_of(self.generator.model, {**mark, **cut}, start - 1)
        del self.turns[kept:], self._marks[kept:], self.tokens[start:]

    def fork(self) -> Session:
        """Gives a session that has said the same and goes its own way from here."""
        twin = Session(self.generator, self.fingerprint)
        twin.tokens, twin.turns, twin._marks = [*self.tokens], [*self.turns], [*self._marks]
        twin.template = self.template
        if states := self._state():
            twin._cache = _cache_of(self.generator.model, states, len(self.tokens) - 1)
        return twin

    def _state(self) -> States:
        """The state's tensors; none where it does not cover the conversation token for token."""
        states = {} if self._cache is None else cache_states(self._cache)
        kept = {state.shape[-2] for name, state in states.items() if ".states." not in name}
        return states if kept <= {len(self.tokens) - 1} else {}

    def save(self, path: str | Path) -> None:
        """Makes a file hold the session, or leaves it as it was.

        Raises:
            OutputError: The file cannot be written, or the disk is full.
        """
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.int64)}
        tensors |= {f"now.{name}": state for name, state in self._state().items()}
        for number, mark in enumerate(self._marks):
            tensors |= {f"turn.{number}.{name}": state for name, state in mark.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        turns = json.dumps([asdict(turn) for turn in self.turns])
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.generator.tokenizer),
            "chat_template": self.template,
            "turns": turns,
            "content": _content_digest(turns, tensors),
        }
        write_file(Path(path), save(tensors, metadata))

    @classmethod
    def load(
        cls, path: str | Path, generator: TextGenerator, fingerprint: str | None = None
    ) -> Session:
        """Gives the session that a file holds.

        Args:
            path: The file.
            generator: The model and tokenizer that the session was held with.
            fingerprint: The model's `model_fingerprint`, if it is known already.

        Raises:
            SessionError: The file is missing, damaged, of another version, or of another model,
                tokenizer or chat template.
        """
        session = cls(generator, fingerprint)
        metadata, tensors = _read(Path(path))
        template = metadata.get("chat_template", "")
        for what, ours in (
            ("model", session.fingerprint),
            ("tokenizer", tokenizer_fingerprint(generator.tokenizer)),
            # A text goes on as one, whatever the tokenizer was given since.
            ("chat_template", session.template if template else template),
        ):
            if metadata.get(what, "") != ours:
                raise SessionError(
                    f"{path}: the session was held with another {what.replace('_', ' ')} (its "
                    "fingerprint differs): give the checkpoint that it was held with, or another "
                    "session file"
                )
        if metadata.get("content") != _content_digest(metadata.get("turns", ""), tensors):
            raise SessionError(
                f"{path}: the session is damaged (its content does not match its checksum): take "
                "a copy that is whole, or begin another"
            )
        session._restore(path, json.loads(metadata["turns"]), tensors)
        if session.turns:
            session.template = template
        return session

    def _restore(self, path: str | Path, turns: list[dict[str, Any]], tensors: States) -> None:
        """Takes over what a file says, if it fits the model."""
        expected = cache_states(_one_token(self.generator.model))
        tokens = tensors["tokens"].tolist()
        groups: dict[str, States] = {"now": {}, **{f"turn.{i}": {} for i in range(len(turns))}}
        for name, tensor in tensors.items():
            if name == "tokens":
                continue
            group, layer, key = _split_name(name)
            like = expected.get(f"{layer}.{key}")
            grows = key in ("keys", "values")
            if (
                group not in groups
                or like is None
                or (grows and group != "now")
                or _shape(tensor, grows) != _shape(like, grows)
                or (grows and tensor.shape[-2] != len(tokens) - 1)
            ):
                raise SessionError(
                    f"{path}: {name} of shape {tuple(tensor.shape)} does not fit the model and "
                    f"{len(tokens)} tokens: the file was not written by this program; begin "
                    "another session"
                )
            groups[group][f"{layer}.{key}"] = tensor.to(self.generator.model.device)
        self.tokens, self.turns = tokens, [Turn(**turn) for turn in turns]
        now = groups.pop("now")
        self._marks = list(groups.values())
        if now:
            self._cache = _cache_of(self.generator.model, now, len(tokens) - 1)

    def _separator(self) -> str:
        """A line break, or a space for a tokenizer that has none."""
        tokenizer = self.generator.tokenizer
        ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
        return "\n" if tokenizer.decode(ids, skip_special_tokens=True) == "\n" else " "


def _template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hex digest of the chat template; nothing where there is none."""
    if not tokenizer.chat_template:
        return ""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def cache_states(cache: Cache) -> States:
    """The tensors that a cache holds, by name; they are the cache's own."""
    states: States = {}
    for index, layer in enumerate(cache.layers):
        for slot, state in getattr(layer, "recurrent_states", {}).items():
            if layer.has_previous_state[slot]:
                states[f"{index}.states.{slot}"] = state
        if isinstance(keys := getattr(layer, "keys", None), Tensor):
            states |= {f"{index}.keys": keys, f"{index}.values": layer.values}
    return states


def _recurrent(states: States) -> States:
    """Those states whose size does not depend on the number of tokens."""
    return {name: state for name, state in states.items() if ".states." in name}


def _cache_of(model: PreTrainedModel, states: States, length: int) -> Cache:
    """A cache for `length` tokens that holds copies of these tensors."""
    config = model.config
    cache = I3Cache(config) if isinstance(config, I3Config) else DynamicCache(config=config)
    for name, state in states.items():
        layer, kind, *slot = name.split(".")
        if kind == "states":
            write_state(cache, int(layer), int(slot[0]), state)
        elif kind == "keys":
            cache.update(state, states[f"{layer}.values"], int(layer))
    if isinstance(cache, I3Cache):
        cache.count_tokens(length)
    return cache


def _in_step(cache: Cache | None, tokens: int) -> Cache | None:
    """The cache, if it covers all of these tokens but the last."""
    return cache if cache is not None and cache.get_seq_length() == tokens - 1 else None


@torch.inference_mode()
def _one_token(model: PreTrainedModel) -> Cache:
    """A cache after one token, which shows the names and shapes of the model's states."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return model(ids, use_cache=True).cache


def _shape(tensor: Tensor, grows: bool) -> tuple[int, ...]:
    """The shape, without the tokens' dimension of keys and values."""
    shape = tuple(tensor.shape)
    return shape[:-2] + shape[-1:] if grows else shape


def _split_name(name: str) -> tuple[str, str, str]:
    """``turn.3.0.states.1`` as ``("turn.3", "0", "states.1")``."""
    parts = name.split(".")
    length = 2 if parts[0] == "turn" else 1
    return (
        ".".join(parts[:length]),
        ".".join(parts[length : length + 1]),
        ".".join(parts[length + 1 :]),
    )


def _digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensor: Any = tensors[name].detach()
        if hasattr(tensor, "__tensor_flatten__"):  # of several tensors, such as int8 with scales
            parts = {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
            _digest_tensors(digest, {f"{name}.{part}": parts[part] for part in parts})
            continue
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _content_digest(turns: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(turns.encode())
    _digest_tensors(digest, tensors)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], States]:
    """The metadata and tensors of a file that is a session of this version."""
    if not path.is_file():
        found = "is no file" if path.exists() else "no such file"
        raise SessionError(f"{path}: {found}; give the path of a saved session")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()  # what `safe_open` gives is no mapping: it has keys alone
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise SessionError(
            f"{path}: not readable as a session ({' '.join(str(error).split())}): the file is "
            "damaged, cut short, or something else; give another file"
        ) from error
    if metadata.get("format") != FORMAT or "tokens" not in tensors:
        raise SessionError(
            f"{path}: a safetensors file, but not a session of i3lm; give another file"
        )
    if metadata.get("version") != VERSION:
        raise SessionError(
            f"{path}: a session of version {metadata.get('version')}, and this program reads "
            f"version {VERSION}: use the version of i3lm that wrote it, or begin another session"
        )
    return metadata, tensors
