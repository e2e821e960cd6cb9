"""Setting documents aside that training never sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from i3lm.data.chat import Document, text_of


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out part.

    The decision is a function of the document's text alone (of a conversation, of what is said),
    so it does not depend on order, on a seed or on the run, and two copies of a document never
    fall on both sides.

    Args:
        document: The document.
        fraction: The expected share of documents that is held out, 0 to 1.
    """
    text = text_of(document).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def held_out_documents(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
    """Yields the documents that are held out."""
    return (document for document in documents if is_held_out(document, fraction))


def training_documents(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
    """Yields the documents that are not held out."""
    return (document for document in documents if not is_held_out(document, fraction))
