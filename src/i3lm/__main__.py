"""``python -m i3lm`` is the command ``i3lm``."""

import sys

from i3lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
