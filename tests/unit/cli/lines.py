"""What the tests of the command line share."""


def one_line(capsys) -> str:
    """Stderr, which must be one line of selftrans, no traceback; nothing is on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("selftrans: ") and err.count("\n") == 1, (out, err)
    return err
