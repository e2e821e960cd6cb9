"""``i3lm chat``"""

from __future__ import annotations

from typing import Any

# Generators, sessions and streamers are Any below: jsonargparse resolves this module's
# annotations, and --help would wait seconds for torch.


def chat(
    checkpoint: str,
    session: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Talks to a model: each line you type is continued. Type quit or exit to stop.

    A base model continues text and does not know questions from answers; what it writes begins
    with your own words. A model that was tuned on conversations, whose tokenizer has a chat
    template, is asked by it, and answers.

    Without --session each line stands alone. With it, each line continues what was said before,
    the model's state is kept so that a turn costs only its new tokens, and the conversation is
    saved after every turn:

    i3lm chat runs/quickstart --session mina.safetensors

    In a session, /rewind takes the last turn back (/rewind 3 the last three), /fork FILE saves a
    copy that goes its own way, /exit stops.

    Args:
        checkpoint: A checkpoint folder, or the output folder of a run (its best model).
        session: A file to keep the conversation in; it is continued if it exists.
        max_new_tokens: Most tokens per turn.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw among this many likeliest tokens; 0 means all.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Seed of the first turn's draws; each turn adds one.
        device: cpu, cuda, mps, or auto for the fastest there is.
        precision: fp32, bf16, fp16 or auto.
    """
    import io
    import sys

    from transformers import TextStreamer

    from i3lm.device import resolve_device, resolve_precision
    from i3lm.inference import SamplingOptions
    from i3lm.inference.loading import load_checkpoint, make_generator
    from i3lm.inference.sessions import model_fingerprint

    options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
    where = resolve_device(device)
    model, tokenizer = load_checkpoint(checkpoint, where)
    fingerprint = None if session is None else model_fingerprint(model)
    generator = make_generator(model, tokenizer, resolve_precision(precision, where))
    talk: Any = _Lines(generator)
    if session is not None:
        talk = _Talk(generator, fingerprint, session)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 are then refused as a prompt, and the talk goes on.
        sys.stdin.reconfigure(errors="surrogateescape")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(talk.greeting)
    _converse(talk, options, streamer)


def _converse(talk: Any, options: Any, streamer: Any) -> None:
    import dataclasses
    import sys

    from i3lm.errors import GenerationError

    while True:
        try:
            line = input("\nUser: ").strip()
        except EOFError:
            print()
            return
        if line.lower() in ("quit", "exit", *talk.ways_out):
            return
        if not line:
            continue
        try:
            if talk.obeys(line):
                continue
            talk.check(line, options)
            print(f"\ni3: {talk.echo(line)}", end="", flush=True)
            completion = talk.say(line, options, streamer)
        except GenerationError as error:
            print(error, file=sys.stderr)
            continue
        print(
            f"[{completion.new_tokens} tokens in {completion.seconds:.2f} s, "
            f"{completion.tokens_per_second:.1f} tokens/s{talk.room}]"
        )
        options = dataclasses.replace(options, seed=(options.seed + 1) % 2**32)


class _Lines:
    """Lines that stand alone, to be continued or, by a chat template, to be answered."""

    greeting = "Type quit or exit to stop."
    ways_out: tuple[str, ...] = ()
    room = ""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.answers = bool(generator.tokenizer.chat_template)

    def check(self, line: str, options: Any) -> None:
        """Refuses a line that there is no room for."""
        from i3lm.inference.loading import check_room

        prompt = len(self.generator.encode_prompt(self._prompt(line)))
        check_room(self.generator.model, prompt, options.max_new_tokens)

    def echo(self, line: str) -> str:
        """What stands before the model's words: the line, where it is continued."""
        return "" if self.answers else line

    def say(self, line: str, options: Any, streamer: Any) -> Any:
        """Continues or answers a line."""
        return self.generator.complete(self._prompt(line), options, streamer)

    def _prompt(self, line: str) -> str:
        if not self.answers:
            return line
        from i3lm.tokenizers import write_question

        return write_question(line, self.generator.tokenizer)[1]

    def obeys(self, line: str) -> bool:
        """Whether the line was a command, which is then done."""
        return False


class _Talk:
    """A conversation in a file."""

    ways_out = ("/quit", "/exit")

    def __init__(self, generator: Any, fingerprint: str | None, path: str) -> None:
        from pathlib import Path

        from i3lm.inference.sessions import Session

        self.path = Path(path)
        if self.path.exists():
            self.session = Session.load(self.path, generator, fingerprint)
        else:
            self.session = Session(generator, fingerprint)
            self.session.save(self.path)  # now, and not after the first turn is lost

    def check(self, line: str, options: Any) -> None:
        """Refuses a line that cannot be said."""
        self.session.encode_turn(line)

    def echo(self, line: str) -> str:
        """What stands before the model's words: the line, where it is continued."""
        return "" if self.session.template else line

    @property
    def greeting(self) -> str:
        """What the conversation is, and how to leave it."""
        return (
            f"{self.path}: {_count(len(self.session.turns), 'turn')} so far"
            f"{self.room}. Type /rewind, /fork FILE, or /exit to stop."
        )

    @property
    def room(self) -> str:
        """How much of the model's context the conversation fills."""
        limit = getattr(self.session.generator.model.config, "max_position_embeddings", None)
        said = len(self.session.tokens)
        if limit is None:
            return f", {said:,} tokens said"
        beyond = ", the oldest out of sight" if said > limit else ""
        return f", {said:,} tokens said of a context of {limit:,}{beyond}"

    def say(self, line: str, options: Any, streamer: Any) -> Any:
        """Adds a turn and saves the conversation."""
        completion = self.session.say(line, options, streamer)
        self.session.save(self.path)
        return completion

    def obeys(self, line: str) -> bool:
        """Whether the line was a command, which is then done."""
        from i3lm.errors import GenerationError

        if not line.startswith("/"):
            return False
        command, _, argument = line.partition(" ")
        if command == "/rewind":
            self._rewind(argument.strip() or "1")
        elif command == "/fork":
            self._fork(argument.strip())
        else:
            raise GenerationError(f"unknown command {command}: there are /rewind, /fork and /exit")
        return True

    def _rewind(self, turns: str) -> None:
        from i3lm.errors import GenerationError

        if not turns.isdecimal():
            raise GenerationError(f"/rewind {turns}: give the number of turns to take back")
        self.session.rewind(int(turns))
        self.session.save(self.path)
        print(f"[{_count(len(self.session.turns), 'turn')} left{self.room}]")

    def _fork(self, path: str) -> None:
        from pathlib import Path

        from i3lm.errors import GenerationError, OutputError

        if not path or Path(path).exists():
            raise GenerationError(
                f"/fork {path}: this file exists; give another"
                if path
                else "/fork needs the path of the file to write: /fork FILE"
            )
        try:
            self.session.save(path)
        except OutputError as error:
            raise GenerationError(str(error)) from error
        print(f"[saved a copy: go on there with --session {path}]")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
