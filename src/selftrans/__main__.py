"""The process of a command: `selftrans`, `python -m selftrans`, `accelerate launch -m selftrans`."""

import sys


def main() -> int:
    """Run the command of this process and return its exit status."""
    try:
        from selftrans.cli.main import main as run  # here, as Ctrl-C may come while it is loading

        return run()
    except KeyboardInterrupt:  # outside of a command, which says more
        print("selftrans: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
