"""The files of the original that tokenizers are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "fixtures" / "tokenizers"
CHUNK_FILE = FOLDER / "chunk_tokenizer.json"
BARE_BPE_FOLDER = FOLDER / "open-i3-200m"


def read_chunk_cases() -> dict[str, Any]:
    return json.loads((FOLDER / "chunk_cases.json").read_text(encoding="utf-8"))


def read_chunk_vocabulary() -> dict[str, int]:
    return json.loads(CHUNK_FILE.read_text(encoding="utf-8"))["chunk_to_idx"]
