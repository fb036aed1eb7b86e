"""The command line: `main` dispatches, `commands` holds one dataclass per command."""
