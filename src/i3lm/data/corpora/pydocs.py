"""The reference text that every CPython ships: real English prose without a download."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from i3lm.errors import DataError


def pydocs() -> Iterator[str]:
    """Python's own language reference, one document per topic, in sorted topic order.

    The text is that of the running Python, so it differs between Python versions.

    Raises:
        DataError: This Python was packaged without its documentation.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "the corpus 'pydocs' needs the module pydoc_data.topics, which this Python lacks "
            f"({error}); use the corpus 'stories', or install a full CPython from python.org"
        ) from error
    for topic in sorted(topics):
        text = topics[topic].replace("\r\n", "\n").replace("\r", "\n").strip()
        if text:
            yield f"{text}\n"
