"""`python -m adaround_plugin`: the same as the `adaround` command."""

import sys

from adaround_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
