"""Setting documents aside that training never sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part.

    The decision is a function of the document's text alone, so it does not depend on order, on
    a seed or on the run, and two copies of a document never fall on both sides.

    Args:
        document: The document's text.
        fraction: The expected share of documents that is held out, 0 to 1.
    """
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def held_out_documents(documents: Iterable[str], fraction: float) -> Iterator[str]:
    """Yields the documents that are held out."""
    return (document for document in documents if is_held_out(document, fraction))


def training_documents(documents: Iterable[str], fraction: float) -> Iterator[str]:
    """Yields the documents that are not held out."""
    return (document for document in documents if not is_held_out(document, fraction))
