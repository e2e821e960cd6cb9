"""Several streams of documents as one, in given proportions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from i3lm.data.streams import DocumentStream, Piece
from i3lm.errors import ConfigurationError

WhenExhausted = Literal["repeat", "drop", "stop"]
WHEN_EXHAUSTED: tuple[WhenExhausted, ...] = ("repeat", "drop", "stop")


@dataclass
class SourceProgress:
    """What a source has given so far.

    Attributes:
        documents: Number of documents, one of two epochs counted twice.
        tokens: Their tokens.
        epoch: In which pass over the source the last of them was, from 0.
    """

    documents: int = 0
    tokens: int = 0
    epoch: int = 0


class Mixture:
    """Documents of several streams, so that each stream's share of the tokens is its weight.

    The next document comes from the stream whose tokens are furthest behind its share (the
    first of them, where several are). Nothing is drawn by chance: after any number of documents
    a stream is ahead of its share by less than one of its documents, and behind it by less than
    (1 + 1/2 + ... + 1/(n - 1)) times the longest document of n streams.

    Args:
        streams: The streams.
        weights: A positive weight for each; only their proportions count.
        when_exhausted: ``repeat``: no stream ends; small ones are seen more often. ``drop``: a
            stream that ends leaves, and the others keep their proportions until all have ended.
            ``stop``: the mixture ends where the first stream does.

    Raises:
        ConfigurationError: There are no streams, two have one name, a weight is not positive, or
            a stream is to end where streams repeat.
    """

    def __init__(
        self,
        streams: Sequence[DocumentStream],
        weights: Sequence[float],
        *,
        when_exhausted: WhenExhausted = "repeat",
    ) -> None:
        _check(streams, weights, when_exhausted)
        names = [stream.name for stream in streams]
        self.streams = dict(zip(names, streams, strict=True))
        self.weights = dict(zip(names, map(float, weights), strict=True))
        self.when_exhausted = when_exhausted
        self.progress = {name: SourceProgress() for name in names}
        self._ended: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        """The streams' settings, their weights, and the rule."""
        return {
            "sources": {name: stream.settings for name, stream in self.streams.items()},
            "weights": self.weights,
            "when_exhausted": self.when_exhausted,
        }

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens of one pass over every stream; None if one of them does not know."""
        total = 0
        for stream in self.streams.values():
            if stream.tokens_per_epoch is None:
                return None
            total += stream.tokens_per_epoch
        return total

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while running := [name for name in self.streams if name not in self._ended]:
            name = self._furthest_behind(running)
            try:
                piece = next(self.streams[name])
            except StopIteration:
                if self.when_exhausted == "stop":
                    raise
                self._ended.append(name)
                continue
            progress = self.progress[name]
            progress.documents += 1
            progress.tokens += len(piece)
            progress.epoch = piece.epoch
            return piece
        raise StopIteration

    def _furthest_behind(self, running: list[str]) -> str:
        tokens = sum(self.progress[name].tokens for name in running)
        weight = math.fsum(self.weights[name] for name in running)

        def deficit(name: str) -> float:
            return tokens * self.weights[name] / weight - self.progress[name].tokens

        return max(running, key=deficit)

    def shares(self) -> dict[str, float]:
        """Gives each stream's part of all tokens so far."""
        total = max(1, sum(progress.tokens for progress in self.progress.values()))
        return {name: progress.tokens / total for name, progress in self.progress.items()}

    def epochs(self) -> dict[str, float]:
        """Gives the passes over each stream so far, whole ones where its length is not known."""
        return {
            name: progress.tokens / tokens
            if (tokens := self.streams[name].tokens_per_epoch)
            else float(progress.epoch)
            for name, progress in self.progress.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Gives the position of every stream, and what each has given."""
        return {
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "progress": {name: asdict(progress) for name, progress in self.progress.items()},
            "ended": list(self._ended),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
            self.progress[name] = SourceProgress(**state["progress"][name])
        self._ended = list(state["ended"])

    def refer(self, piece: Piece) -> dict[str, Any]:
        """Gives the stream's own note, with the stream's name."""
        return {"source": piece.source, "piece": self.streams[piece.source].refer(piece)}

    def recall(self, reference: dict[str, Any]) -> Piece:
        """Asks the stream that the piece came from."""
        return self.streams[reference["source"]].recall(reference["piece"])


def _check(
    streams: Sequence[DocumentStream], weights: Sequence[float], when_exhausted: str
) -> None:
    names = [stream.name for stream in streams]
    if not names:
        raise ConfigurationError("a mixture needs at least one source; give one")
    if len(weights) != len(names):
        raise ConfigurationError(
            f"there are {len(weights)} weights for {len(names)} sources: give one for each"
        )
    if when_exhausted not in WHEN_EXHAUSTED:
        raise ConfigurationError(
            f"when_exhausted is {when_exhausted!r}; it must be one of {', '.join(WHEN_EXHAUSTED)}"
        )
    for stream, weight in zip(streams, weights, strict=True):
        if names.count(stream.name) > 1:
            raise ConfigurationError(
                f"{stream.name} is in the mixture more than once: give it once, with the sum of "
                "the weights, or under another name"
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigurationError(
                f"the weight of {stream.name} is {weight}; it must be a positive number: leave "
                "out a source that is not wanted"
            )
        if when_exhausted == "repeat" and stream.epochs is not None:
            raise ConfigurationError(
                f"{stream.name} is to end after {stream.epochs} epochs, but when_exhausted is "
                "'repeat': leave the epochs out, or choose 'drop' or 'stop'"
            )
