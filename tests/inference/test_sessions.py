from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i3lm.errors import GenerationError, OutputError, SessionError
from i3lm.inference import SamplingOptions, TextGenerator
from i3lm.inference import sessions as sessions_module
from i3lm.inference.loading import load_checkpoint, load_model
from i3lm.inference.sessions import FORMAT, Session, model_fingerprint
from i3lm.tokenizers import ensure_chat_template, tokenizer_fingerprint, train_tokenizer
from tests.inference.talking import OPTIONS, record
from tests.models.tiny_i3 import KINDS, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

every_kind = pytest.mark.parametrize("kind", KINDS)
CHARACTERS = train_tokenizer("character", ["the quick brown fox jumps over the lazy dog\n."])
SPEAKERS = "User: Assistant: the quick brown fox jumps over the lazy dog\n. "
END_OF_TEXT = train_tokenizer("bpe", ["the quick brown fox jumps. "], vocab_size=270)


def make_generator(
    kind: str = "rwkv4", *, tokenizer: Any = CHARACTERS, context: int = 200, seed: int = 0
) -> TextGenerator:
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    return TextGenerator(make_model(kind, seed, **sizes), tokenizer)


def talk(generator: TextGenerator, *lines: str, options: SamplingOptions = OPTIONS) -> Session:
    session = Session(generator)
    for line in lines:
        session.say(line, options)
    return session


def next_turn(session: Session, line: str = "and then") -> list[torch.Tensor]:
    """Everything that the model computes in one more turn."""
    seen = record(session.generator)
    session.say(line, OPTIONS)
    result = list(seen)
    session.generator.model.lm_head._forward_hooks.clear()
    return result


def assert_bitwise_equal(
    first: list[torch.Tensor], second: list[torch.Tensor], kind: str = ""
) -> None:
    assert len(first) == len(second) == 2 * OPTIONS.max_new_tokens
    if "sliding" in kind:  # its state is computed again, all at once and not token by token
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        return
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What a turn computes


def test_a_checkpoint_that_asks_for_another_cache():
    generator = make_generator()
    expected = talk(generator, "the fox", "the dog")
    generator.model.generation_config.cache_implementation = "static"
    assert talk(generator, "the fox", "the dog").tokens == expected.tokens


@every_kind
def test_a_turn_is_what_one_pass_over_all_tokens_gives(kind: str):
    generator = make_generator(kind)
    session = talk(generator, "the fox", "the dog")
    logits = next_turn(session)[1::2]
    with torch.no_grad():
        whole = generator.model(torch.tensor([session.tokens]), use_cache=False).logits[0]
    for step, row in enumerate(logits):
        expected = whole[len(session.tokens) - OPTIONS.max_new_tokens - 1 + step]
        # float32 in another order; logits here are of size 5.
        torch.testing.assert_close(row[0, -1], expected, atol=2e-5, rtol=0)


@every_kind
def test_a_turn_costs_only_its_new_tokens(kind: str):
    generator = make_generator(kind)
    positions: list[int] = []
    generator.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: positions.append(output.shape[1])
    )
    session = Session(generator)
    for line in ("the fox jumps", "over", "the lazy dog"):
        positions.clear()
        completion = session.say(line, OPTIONS)
        # The last token of the reply before is not in the state yet, nor is the line break.
        extra = 0 if line == "the fox jumps" else 2
        assert positions == [len(line) + extra, *[1] * (OPTIONS.max_new_tokens - 1)]
        assert completion.prompt_tokens == len(line) + bool(extra)


def test_turns_are_lines_of_one_text():
    session = talk(make_generator(), "the fox", "the dog")
    first, second = session.turns
    assert (first.start, second.start) == (0, 7 + OPTIONS.max_new_tokens)
    text = session.generator.tokenizer.decode(session.tokens, skip_special_tokens=True)
    assert text == f"the fox{first.reply}\nthe dog{second.reply}"


def test_no_line_break_after_the_end_of_a_document():
    generator = make_generator(tokenizer=END_OF_TEXT)
    end = END_OF_TEXT.eos_token_id
    session = talk(generator, "the fox")
    assert session.tokens[0] == end
    assert END_OF_TEXT.decode(session.encode_turn("dog")) == "\ndog"
    session.tokens[-1] = end
    assert session.encode_turn("dog") == END_OF_TEXT("dog")["input_ids"]


def test_a_tokenizer_without_line_breaks_takes_a_space():
    generator = make_generator(tokenizer=train_tokenizer("character", ["the fox"]))
    session = talk(generator, "the")
    assert generator.tokenizer.decode(session.encode_turn("fox")) == " fox"


# Conversations by a chat template


def make_chatty(kind: str = "rwkv4", tokenizer: str = "character") -> TextGenerator:
    """A model whose tokenizer has the plain chat template."""
    size = 280 if tokenizer == "bpe" else None
    trained = train_tokenizer(tokenizer, [SPEAKERS * 3], vocab_size=size)
    ensure_chat_template(trained)
    return make_generator(kind, tokenizer=trained)


@pytest.mark.parametrize("tokenizer", ["character", "bpe"])
def test_a_session_is_what_the_template_writes(tokenizer: str):
    session = talk(make_chatty(tokenizer=tokenizer), "the fox", "the dog", "quick")
    said = session.generator.tokenizer.decode(session.tokens)
    end = session.generator.tokenizer.eos_token
    first, second, third = (turn.reply for turn in session.turns)
    assert said == (
        f"{end or ''}User: the fox\nAssistant:{first}{end or chr(10)}"
        f"User: the dog\nAssistant:{second}{end or chr(10)}User: quick\nAssistant:{third}"
    )


def test_a_reply_that_the_model_ended_is_not_ended_again():
    session = talk(make_chatty(tokenizer="bpe"), "the fox")
    tokenizer = session.generator.tokenizer
    end, question = tokenizer.eos_token_id, "User: dog\nAssistant:"
    assert session.tokens[-1] != end
    asked = tokenizer(question)["input_ids"]
    assert session.encode_turn("dog") == [end, *asked]
    session.tokens[-1] = end
    assert session.encode_turn("dog") == asked


@every_kind
def test_a_question_costs_only_its_new_tokens(kind: str, tmp_path: Path):
    generator = make_chatty(kind)
    positions: list[int] = []
    generator.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: positions.append(output.shape[1])
    )
    session = talk(generator, "the fox", "the dog")
    session.save(tmp_path / "s")
    sessions = [session.fork(), Session.load(tmp_path / "s", generator), session]
    for one in sessions[2 * ("sliding" in kind) :]:  # a window is not kept, but computed again
        positions.clear()
        one.say("jumps", OPTIONS)
        # The last token of the reply, its end unless the model wrote it, and the question.
        new = 1 + (not one.turns[1].reply.endswith("\n")) + len("User: jumps\nAssistant:")
        assert positions == [new, *[1] * (OPTIONS.max_new_tokens - 1)]


@every_kind
def test_conversations_are_saved_rewound_and_forked_by_turns(kind: str, tmp_path: Path):
    generator = make_chatty(kind)
    session, expected = talk(generator, "the fox", "the dog"), talk(generator, "the fox")
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", generator)
    assert (loaded.tokens, loaded.turns) == (session.tokens, session.turns)
    fork = session.fork()
    for one in (session, loaded, fork):
        one.rewind()
        assert (one.tokens, one.turns) == (expected.tokens, expected.turns)
    steps = next_turn(expected)
    for one in (session, loaded, fork):
        assert_bitwise_equal(next_turn(one), steps, kind)


def test_a_text_that_was_begun_without_a_template_goes_on_as_a_text(tmp_path: Path):
    generator = make_chatty()
    template, generator.tokenizer.chat_template = generator.tokenizer.chat_template, None
    session, empty = talk(generator, "the fox"), Session(generator)
    session.save(tmp_path / "text")
    empty.save(tmp_path / "empty")
    # As files were before there were templates.
    for name in ("text", "empty"):
        rewrite(tmp_path / name, lambda metadata, tensors: metadata.pop("chat_template"))
    generator.tokenizer.chat_template = template
    loaded = Session.load(tmp_path / "text", generator)
    assert generator.tokenizer.decode(loaded.encode_turn("dog")) == "\ndog"
    assert_bitwise_equal(next_turn(loaded), next_turn(session))
    asked = Session.load(tmp_path / "empty", generator).encode_turn("dog")
    assert generator.tokenizer.decode(asked) == "User: dog\nAssistant:"


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_sessions_of_another_chat_template(tmp_path: Path, template: str | None):
    session = talk(make_chatty(), "the fox")
    session.save(tmp_path / "s")
    session.generator.tokenizer.chat_template = template
    with pytest.raises(SessionError, match="s: the session was held with another chat template"):
        Session.load(tmp_path / "s", session.generator)


# Saving and loading


def test_continuing_in_another_process_is_bitwise_the_same(tmp_path: Path):
    arguments, expected = [], {}
    for kind in ("rwkv4", "state_space", "v1", "all rwkv4"):
        folder, file = tmp_path / kind, tmp_path / f"{kind}.session"
        make_generator(kind).model.save_pretrained(folder)
        CHARACTERS.save_pretrained(folder)
        # Read back here too: matrix products may depend on where in memory the weights lie.
        generator = TextGenerator(*load_checkpoint(folder))
        session = talk(generator, "the fox", "the dog")
        session.save(file)
        expected[file] = next_turn(session)
        arguments += [str(folder), str(file)]
    script = Path(__file__).with_name("talking.py")
    finished = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    for file, steps in expected.items():
        written = load_file(f"{file}.logits")
        assert_bitwise_equal([written[str(i)] for i in range(len(written))], steps)


@every_kind
def test_loading_gives_back_everything(kind: str, tmp_path: Path):
    session = talk(make_generator(kind), "the fox", "the dog", "jumps")
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", session.generator)
    assert (loaded.tokens, loaded.turns) == (session.tokens, session.turns)
    for one in (session, loaded):
        one.rewind(2)
    assert_bitwise_equal(next_turn(session), next_turn(loaded))


@pytest.mark.parametrize("kind", ["rwkv4", "state_space"])
def test_loading_in_bfloat16(kind: str, tmp_path: Path):
    generator = make_generator(kind)
    generator.precision = "bf16"
    session = talk(generator, "the fox", "the dog")
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", generator)
    assert_bitwise_equal(next_turn(session), next_turn(loaded))


def test_a_session_without_turns_is_saved_too(tmp_path: Path):
    session = Session(make_generator())
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", session.generator)
    assert_bitwise_equal(next_turn(loaded), next_turn(session))


def test_the_file_is_safetensors_with_the_texts_readable(tmp_path: Path):
    session = talk(make_generator(), "the fox")
    session.save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("tokens").tolist() == session.tokens
    assert metadata["format"] == FORMAT
    assert json.loads(metadata["turns"])[0]["prompt"] == "the fox"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_marks_of_turns_do_not_grow_with_the_conversation(tmp_path: Path):
    session = talk(make_generator("rwkv4"), *["the fox"] * 4)
    session.save(tmp_path / "s")
    sizes: dict[str, int] = {}
    for name, tensor in load_file(tmp_path / "s").items():
        group = name.partition(".states.")[0].rpartition(".")[0]
        sizes[group] = sizes.get(group, 0) + tensor.numel()
    assert "turn.0" not in sizes
    assert sizes["turn.1"] == sizes["turn.3"] == 2 * 12 * (3 + 1 + 1)  # layers, C, vectors


# Forking and rewinding


@every_kind
def test_a_fork_and_its_origin_do_not_touch_each_other(kind: str):
    session = talk(make_generator(kind), "the fox")
    untouched, fork = talk(session.generator, "the fox"), session.fork()
    fork.say("quick", OPTIONS)
    assert_bitwise_equal(next_turn(session), next_turn(untouched))
    assert fork.turns[:1] == session.turns[:1]
    assert fork.turns[1].prompt == "quick"
    assert_bitwise_equal(
        next_turn(fork), next_turn(talk(session.generator, "the fox", "quick")), kind
    )


@every_kind
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rewound_turn_was_never_said(kind: str, turns: int):
    lines = ["the fox", "the dog", "jumps"]
    generator = make_generator(kind)
    session, expected = talk(generator, *lines), talk(generator, *lines[: 3 - turns])
    session.rewind(turns)
    assert (session.tokens, session.turns) == (expected.tokens, expected.turns)
    assert_bitwise_equal(next_turn(session), next_turn(expected), kind)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["say", "rewind", "fork", "save"]), max_size=8))
def test_any_order_of_doing_ends_in_the_text_that_was_said(actions: list[str]):
    import tempfile

    generator = make_generator("attention below")
    session, said = Session(generator), []
    for number, action in enumerate(actions):
        if action == "say":
            said.append(f"fox {'x' * (number % 3)}")
            session.say(said[-1], OPTIONS)
        elif action == "rewind" and said:
            session.rewind()
            said.pop()
        elif action == "fork":
            twin = session.fork()
            session.say("gone", OPTIONS)
            session = twin
        elif action == "save":
            with tempfile.TemporaryDirectory() as folder:
                session.save(Path(folder) / "s")
                session = Session.load(Path(folder) / "s", generator)
    assert_bitwise_equal(next_turn(session), next_turn(talk(generator, *said)))


@pytest.mark.parametrize("turns", [0, 2, -1])
def test_going_back_further_than_the_start(turns: int):
    session = talk(make_generator(), "the fox")
    before = [*session.tokens]
    with pytest.raises(GenerationError, match=f"cannot go back {turns} turns: the session has 1"):
        session.rewind(turns)
    assert session.tokens == before


# Beyond the context, and trouble in a turn


@every_kind
def test_past_the_context_a_turn_follows_the_rules_of_generate(kind: str, tmp_path: Path):
    generator = make_generator(kind, context=24)
    session = talk(generator, "the fox", "the dog")
    ids = [*session.tokens, *session.encode_turn("and then")]
    assert len(ids) > 24
    expected = generator.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", generator)
    for one in (session, loaded):
        one.say("and then", SamplingOptions(6, temperature=0))
        assert one.tokens == expected[0].tolist()


SHIFT = SamplingOptions(9, temperature=0, context_overflow="shift")
LONG_TALK = ["the fox", "the lazy dog", "jumps over", "and then", "the brown dog"]


def by_hand(generator: TextGenerator, lines: list[str]) -> list[int]:
    """What `generate` makes of the same talk by ``shift``, each turn from its tokens alone."""
    tokens: list[int] = []
    for line in lines:
        ids = [*tokens, *generator.encode_prompt("\n" * bool(tokens) + line)]
        output = generator.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=SHIFT.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            context_overflow="shift",
        )
        tokens = output[0].tolist()
    return tokens


@every_kind
def test_shifted_past_the_context(kind: str, tmp_path: Path):
    generator = make_generator(kind, context=24)
    session = talk(generator, *LONG_TALK[:4], options=SHIFT)
    assert len(session.tokens) > 3 * 24
    assert session.tokens == by_hand(generator, LONG_TALK[:4])
    session.save(tmp_path / "s")
    loaded, fork = Session.load(tmp_path / "s", generator), session.fork()
    assert (loaded.tokens, loaded.turns) == (session.tokens, session.turns)
    expected = by_hand(generator, LONG_TALK)
    for one in (session, loaded, fork):
        one.say(LONG_TALK[4], SHIFT)
        assert one.tokens == expected
        assert [turn.prompt for turn in one.turns] == LONG_TALK


@every_kind
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_rewound_after_shifting(kind: str, turns: int, tmp_path: Path):
    generator = make_generator(kind, context=24)
    session = talk(generator, *LONG_TALK[:4], options=SHIFT)
    session.save(tmp_path / "s")
    loaded, fork = Session.load(tmp_path / "s", generator), session.fork()
    kept = LONG_TALK[: 4 - turns]
    expected = by_hand(generator, [*kept, "quick", "jumps"])
    for one in (session, loaded, fork):
        one.rewind(turns)
        assert one.tokens == by_hand(generator, kept)
        for line in ("quick", "jumps"):
            one.say(line, SHIFT)
        assert one.tokens == expected
        assert [turn.prompt for turn in one.turns] == [*kept, "quick", "jumps"]


def test_the_file_of_a_shifted_session_holds_the_states_that_cover_it(tmp_path: Path):
    session = talk(make_generator(context=24), *LONG_TALK[:4], options=SHIFT)
    session.save(tmp_path / "s")
    # One turn ended within the context, so the state at the second turn's start is known.
    assert {name[:6] for name in load_file(tmp_path / "s")} == {"tokens", "turn.1"}


def test_rewinding_into_the_context_again():
    generator = make_generator(context=24)
    session = talk(generator, "the fox", "the lazy dog", "jumps")
    assert len(session.tokens) > 24
    session.rewind(2)
    expected = talk(generator, "the fox")
    for got, wanted in zip(next_turn(session), next_turn(expected), strict=True):
        # Computed again at once, where it was computed token by token.
        torch.testing.assert_close(got[0, -1], wanted[0, -1], atol=2e-5, rtol=0)
    assert session.tokens == expected.tokens


def test_an_interrupted_turn_leaves_the_session_as_it_was(monkeypatch: pytest.MonkeyPatch):
    generator = make_generator()
    session, expected = talk(generator, "the fox"), talk(generator, "the fox")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generator.model.lm_head, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            session.say("the dog", OPTIONS)
    assert (session.tokens, session.turns) == (expected.tokens, expected.turns)
    session.say("and then", OPTIONS)
    expected.say("and then", OPTIONS)
    assert session.tokens == expected.tokens


# Fingerprints


def test_a_fingerprint_names_what_the_model_computes(tmp_path: Path):
    model = make_model("rwkv4")
    fingerprint = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(load_model(tmp_path)) == fingerprint
    assert model_fingerprint(make_model("rwkv4", seed=1)) != fingerprint
    for key, value in (("layer_norm_eps", 1e-3), ("num_attention_heads", 2)):
        assert model_fingerprint(make_model("rwkv4", **{key: value})) != fingerprint
    with torch.no_grad():
        model.model.layers[1].mixer.key.weight[3, 5] += 1e-6
    assert model_fingerprint(model) != fingerprint


# Files that cannot be taken


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Session, Path]:
    session = talk(make_generator(), "the fox", "the dog")
    session.save(tmp_path / "s")
    return session, tmp_path / "s"


def rewrite(path: Path, change: Any, *, checksum: bool = True) -> None:
    """Writes a session file again with its metadata and tensors changed."""
    with safe_open(path, "pt") as file:
        names = file.keys()
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in names}
    change(metadata, tensors)
    if checksum:
        metadata["content"] = sessions_module._content_digest(metadata["turns"], tensors)
    save_file(tensors, path, metadata)


def test_sessions_of_another_model_or_tokenizer(saved: tuple[Session, Path]):
    _, path = saved
    with pytest.raises(SessionError, match="s: the session was held with another model"):
        Session.load(path, make_generator(seed=1))
    other = train_tokenizer("character", ["The quick brown fox jumps over the lazy dog\n"])
    generator = make_generator()
    assert len(other) == len(CHARACTERS)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(CHARACTERS)
    generator.tokenizer = other
    with pytest.raises(SessionError, match="was held with another tokenizer"):
        Session.load(path, generator)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_sessions_cut_short(saved: tuple[Session, Path], kept: float):
    session, path = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(SessionError, match="s: not readable as a session"):
        Session.load(path, session.generator)


def test_damaged_sessions(saved: tuple[Session, Path]):
    session, path = saved
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(SessionError, match="s: the session is damaged"):
        Session.load(path, session.generator)
    path.write_bytes(b"\x93garbage" * 99)
    with pytest.raises(SessionError, match="s: not readable as a session"):
        Session.load(path, session.generator)
    save_file({"tokens": torch.zeros(3)}, path)
    with pytest.raises(SessionError, match="a safetensors file, but not a session of i3lm"):
        Session.load(path, session.generator)
    with pytest.raises(SessionError, match="no such file"):
        Session.load(path.with_name("t"), session.generator)
    with pytest.raises(SessionError, match="is no file; give the path of a saved session"):
        Session.load(path.parent, session.generator)


def test_sessions_of_another_version(saved: tuple[Session, Path]):
    session, path = saved
    rewrite(path, lambda metadata, tensors: metadata.update(version="2"))
    with pytest.raises(SessionError, match="a session of version 2, and this program reads ver"):
        Session.load(path, session.generator)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("now.0.states.0", torch.zeros(1, 3, 11)),
        ("now.2.keys", torch.zeros(1, 3, 5, 4)),
        ("now.7.states.0", torch.zeros(1)),
        ("turn.5.0.states.0", torch.zeros(1, 3, 12)),
        ("turn.1.2.keys", torch.zeros(1, 3, 5, 4)),
        ("what", torch.zeros(1)),
    ],
)
def test_states_that_do_not_fit(saved: tuple[Session, Path], name: str, tensor: torch.Tensor):
    session, path = saved
    rewrite(path, lambda metadata, tensors: tensors.update({name: tensor}))
    with pytest.raises(SessionError, match=f"{name} of shape .* does not fit the model and 27 tok"):
        Session.load(path, session.generator)


def test_a_file_that_cannot_be_written_keeps_its_content(
    saved: tuple[Session, Path], monkeypatch: pytest.MonkeyPatch
):
    session, path = saved
    before = path.read_bytes()
    session.say("and then", OPTIONS)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match=r"s: cannot be written: no space is left"):
        session.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["s"]
