"""`python -m saelens_scaffold` is the command `saelens-scaffold`."""

import sys

from saelens_scaffold_cli import main

if __name__ == "__main__":
    sys.exit(main())
