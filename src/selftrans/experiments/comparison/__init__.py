"""The parts of `selftrans compare`; begin with `compare.py`. Also used by quickstart, which compares three methods."""
