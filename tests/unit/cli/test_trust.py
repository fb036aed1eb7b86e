"""`--trust MODULE:FUNCTION` imports that module before the command runs; a wrong value is one line."""

import re
import sys

import pytest

from selftrans.cli.main import main, parse_command
from selftrans.plugins import trust
from tests.unit.cli.lines import one_line

COMMANDS = {
    "train": "train digits --out x",
    "compare": "compare digits --out x",
    "sample": "sample run --out x",
    "evaluate": "evaluate run --reference digits",
    "analyse": "analyse run --out x",
    "export": "export run --out x",
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Two importable modules outside the package."""
    for name in ("outside_one", "outside_two"):
        (tmp_path / f"{name}.py").write_text("def method(config):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("outside_one", "outside_two"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_trusted_code_is_imported_before_the_command_runs(argv, outside):
    command = parse_command([*argv.split(), "--trust", "outside_one:method", "--trust=outside_two:method"])
    assert command.trust == ("outside_one:method", "outside_two:method")
    assert {"outside_one", "outside_two"} <= set(sys.modules)
    assert "trust" not in command.options()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("outside_one", "--trust outside_one names no code; write MODULE:FUNCTION"),
        ("outside_one:", "--trust outside_one: names no code"),
        (":method", "--trust :method names no code"),
        ("no_such_module:method", "no_such_module:method cannot be imported: No module named 'no_such_module'"),
        ("outside_one:other", "outside_one:other cannot be imported: outside_one has no other"),
    ],
)
def test_code_that_cannot_be_imported(name, expected, outside, capsys):
    with pytest.raises(ValueError, match=re.escape(expected)):
        trust(name)
    for argv in COMMANDS.values():
        assert main([*argv.split(), "--trust", name]) == 1
        assert expected in one_line(capsys)
