"""A helper of the tests of the command line."""


def one_line(capsys) -> str:
    """Stderr. AssertionError unless it is one line of selftrans, without a traceback, and stdout is empty."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("selftrans: ") and err.count("\n") == 1, (out, err)
    return err
