"""Where numba keeps compiled kernels, and when it must compile them anew.

numba keeps a function's code as long as the file that defines it stays the same. What the function
calls from other files is compiled into it, though: with only those changed, as after an update of
this package, the old code would run on, with tables laid out in a way that it does not know.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from numba import config
from numba.core import caching

_KERNELS = Path(__file__).parent


@functools.cache
def digest_of_sources(folder: Path) -> str:
    """Gives a digest of all Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


class _OfAllSources:
    """Makes a locator serve our kernels alone, whose code is of the files of all."""

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        parent: Any = super()
        ours = Path(file).is_relative_to(_KERNELS)
        return parent.from_function(function, file) if ours else None

    def get_source_stamp(self) -> str:
        return digest_of_sources(_KERNELS)


class InGivenFolder(_OfAllSources, caching.UserProvidedCacheLocator):
    """In the folder that NUMBA_CACHE_DIR names."""


class BesideSource(_OfAllSources, caching.InTreeCacheLocator):
    """In the `__pycache__` beside the source."""


class OfUser(_OfAllSources, caching.UserWideCacheLocator):
    """In the user's folder for caches, where that cannot be written."""


def know_all_sources() -> None:
    """Makes numba ask for our kernels as above, and for all others as it did."""
    ours = [f"{__name__}.{kind.__name__}" for kind in (InGivenFolder, BesideSource, OfUser)]
    settings: Any = config
    theirs = [kind.__name__ for kind in caching.CacheImpl._locator_classes]
    others = settings.CACHE_LOCATOR_CLASSES or ",".join(theirs)
    if ours[0] not in others:
        settings.CACHE_LOCATOR_CLASSES = ",".join([*ours, others])
