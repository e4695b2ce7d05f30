"""`python -m haomiao`: the same as the `haomiao` command."""

import sys

from haomiao.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
