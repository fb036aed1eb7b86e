"""`python -m selftrans` and `accelerate launch -m selftrans`: the same as the command `selftrans`."""

import sys

from selftrans.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
