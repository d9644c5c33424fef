"""``python -m gateplug`` is the command ``gateplug``."""

import sys

from gateplug.cli import main

if __name__ == "__main__":
    sys.exit(main())
