"""Trains one run after the other in the same processes, so that tests import once.

    torchrun --nproc-per-node 2 -m tests.training.several_runs FILE

FILE holds the arguments of each `i3lm train` as a JSON list. The exit status is that of the first
run that fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from i3lm.cli import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if status := main(["train", *arguments]):
            sys.exit(status)
