"""Running text, cut into documents of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from i3lm.data.sources.records import BadRecordError
from i3lm.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Documents cut from running text have about this many characters; a hundredth of a small file,
# so that some of them are held out.
_BLOCK_CHARACTERS, _LEAST_BLOCK_CHARACTERS = 2_000, 200
# A longer line or document is cut, so that one of any length can be read: where marks say what a
# document is, only beyond the length of a long book.
_LONGEST_MARKED, _LONGEST_UNMARKED = 2**22, 2**16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How much of a file is looked at to see what it is.
HEAD_BYTES = 2**20
_MOST_BAD_LINES = 0.1


@dataclass(frozen=True)
class CutStyle:
    """How a text file is cut into documents.

    Attributes:
        cut: At ``marks`` (lines that say ``<|endoftext|>``), else between ``paragraphs``
            (at blank lines), else between ``lines``.
        block_length: Characters that an unmarked document has at least.
        longest: Characters after which a line or a document is cut in any case.
    """

    cut: str
    block_length: int
    longest: int


@dataclass(frozen=True)
class Line:
    """A line of a text file, or a part of a very long one, with its place in bytes."""

    content: bytes
    start: int
    end: int
    number: int

    def decode(self) -> str:
        """Gives the line as text, its end as ``\\n``.

        Raises:
            BadRecordError: It is not UTF-8.
        """
        content = self.content
        if self.start == 0:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRecordError("not UTF-8", f"{_not_utf8(error)}") from error
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return (
        f"is not UTF-8 (byte 0x{byte:02x} cannot be decoded); convert it first, for example "
        "with: iconv -f latin1 -t utf-8"
    )


def read_lines(
    file: BinaryIO, *, start: int = 0, number: int = 0, longest: int | None = None
) -> Iterator[Line]:
    """Yields the lines of a file, the longest ones in parts.

    Args:
        file: The file, at byte `start`.
        start: The place of the first line in bytes.
        number: How many lines are before it.
        longest: Bytes that a line is cut at, after white space where there is some; None to
            give every line as a whole. Where it is cut depends on its own bytes alone, so that
            reading may begin at any part.
    """
    pending = b""
    while True:
        limit = -1 if longest is None else longest - len(pending)
        content = pending + file.readline(limit)
        pending = b""
        if not content:
            return
        whole = longest is None or len(content) < longest or content.endswith(b"\n")
        if not whole:
            cut = _cut_point(content)
            content, pending = content[:cut], content[cut:]
        end = start + len(content)
        yield Line(content, start, end, number + 1)
        start = end
        number += whole


def _cut_point(content: bytes) -> int:
    """Where to cut a part of a line: after its last white space, else between characters."""
    space = max(content.rfind(b" "), content.rfind(b"\t"), content.rfind(b"\r"))
    if space > len(content) // 2:
        return space + 1
    cut = len(content)
    while cut > len(content) - 4 and content[cut - 1] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    first = content[cut - 1] if content[cut - 1] >= 0xC0 else 0
    return cut - 1 if first else len(content)


def find_cut_style(head: bytes, *, whole: bool, name: str) -> CutStyle:
    """Says how to cut a file, judged by its first megabyte.

    Args:
        head: Its first bytes.
        whole: Whether they are all of it.
        name: The file's name, for the error.

    Raises:
        DataError: More than one line in ten is not UTF-8.
    """
    lines = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    if not whole and len(lines) > 1:
        lines.pop()  # it may be cut
    _check_utf8(lines if whole or len(lines) > 1 else [], name)
    stripped = [line.strip() for line in lines]
    if END_OF_TEXT.encode() in stripped:
        cut = "marks"
    else:
        cut = "paragraphs" if b"" in stripped[:-1] else "lines"
    block_length = max(_LEAST_BLOCK_CHARACTERS, min(_BLOCK_CHARACTERS, len(head) // 100))
    longest = _LONGEST_MARKED if cut == "marks" else _LONGEST_UNMARKED
    return CutStyle(cut, block_length, longest)


def _check_utf8(lines: list[bytes], name: str) -> None:
    bad, first = 0, None
    for line in lines:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad, first = bad + 1, first or error
    if first is not None and bad > _MOST_BAD_LINES * sum(map(bool, lines)):
        raise DataError(f"{name}: {_not_utf8(first)}") from first


def cut_documents(
    lines: Iterator[tuple[Line, str]], style: CutStyle
) -> Iterator[tuple[str, int, int]]:
    """Cuts text into documents.

    A file with ``<|endoftext|>`` marks is cut there. Any other file is cut between paragraphs
    (at blank lines; between lines where there are none) into blocks of about 2,000 characters
    (fewer in a file under 200 kB), so that neighbouring text stays together and a held-out part
    can be set aside.

    Args:
        lines: The lines, each with its text.
        style: How to cut.

    Yields:
        A document, the byte after it, and how many lines are before that byte.
    """
    block: list[str] = []
    length, previous_blank = 0, False
    end = number = 0
    for line, text in lines:
        blank = not text.strip()
        drop = style.cut == "marks" and text.strip() == END_OF_TEXT
        if style.cut == "marks":
            cut = drop or length >= style.longest
        else:
            boundary = not blank and (previous_blank or style.cut == "lines")
            cut = length >= style.longest or (length >= style.block_length and boundary)
        if cut:
            place = (line.end, line.number) if drop else (line.start, line.number - 1)
            yield "".join(block).strip(), *place
            block, length = [], 0
        if not drop:
            block.append(text)
            length += len(text)
        previous_blank = blank
        end, number = line.end, line.number
    yield "".join(block).strip(), end, number
