"""Wrong arguments of commands without a recipe: one line that names the option; and the text of help pages."""

import os

import pytest
import tyro

from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import main
from selftrans.cli.parse import blank, option_names, wrapped
from tests.unit.cli.lines import one_line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("sample", "RUN_OR_FILE and --out PATH are missing (see selftrans sample --help)"),
        ("sample run", "--out PATH is missing (see selftrans sample --help)"),
        (
            "sample run --out x --stpes 3",
            "option --stpes is unknown; did you mean --steps? (see selftrans sample --help)",
        ),
        ("sample run --uot x", "option --uot is unknown; did you mean --out? (see selftrans sample --help)"),
        ("sample run --out x --num few", "--num: 'few' is not a whole number"),
        ("sample run --out x --guidance_scal 2", "did you mean --guidance-scale?"),
        ("sample run --out x --device cuda", "option --device is unknown: the device is found automatically"),
        ("sample run --out x y", "'y' is one argument too many"),
        ("sample run --out=", "--out needs a value (see selftrans sample --help)"),
        ("evaluate --reference digits --nonsense", "SAMPLES is missing (see selftrans evaluate --help)"),
        ("sample run --out x --guidance-scale much", "--guidance-scale: 'much' is not a number"),
        ("evaluate made", "--reference STR is missing"),
        ("evaluate made --reference", "--reference needs a value: STR"),
        ("analyse run --out x --timestep 0.4", "did you mean --timesteps?"),
        ("prepare pictures --out x --dtype float8", "--dtype 'float8' is not one of None, float16, float32"),
        ("prepare pictures --out x --flip yes", "'yes' is one argument too many"),
        ("classifier data --out x --epochs 1.5", "--epochs: '1.5' is not a whole number"),
        ("bench --device tpu", "--device 'tpu' is not one of None, cpu, cuda"),
        ("analyse run --out x --target --w 1 strong", "--w: 'strong' is not a number"),
        ("analyse run --out x --target --scales=strong", "--scales: 'strong' is not a number"),
        ("analyse run --out x --target --blocks 2 1.5", "--blocks: '1.5' is not a whole number"),
        ("analyse run --out x --images few", "--images: 'few' is not a whole number"),
        ("compare digits --out x --seeds a", "--seeds: 'a' is not a whole number"),
        ("sample run --out x --guidance-interval 0 late", "--guidance-interval: 'late' is not a number"),
        ("sample run --out x --guidance-interval 0.5", "--guidance-interval: 2 numbers are needed, not 1"),
    ],
)
def test_wrong_arguments(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    line = one_line(capsys)
    assert expected in line and line.endswith(" --help)\n")
    assert list(tmp_path.iterdir()) == []


def test_empty_argument_is_refused(capsys):
    assert main(["sample", "run", "--out", ""]) == 2
    assert "--out needs a value" in one_line(capsys)


def test_help_takes_precedence_over_wrong_arguments(capsys):
    assert main(["sample", "run", "--stpes", "3", "--help"]) == 0
    assert "RUN_OR_FILE" in capsys.readouterr().out


@pytest.mark.parametrize("argv", ["sample", "sample run --out x --stpes 3", "sample run --out x --num few"])
def test_tyro_without_the_hook_prints_its_own_text(argv, capsys, monkeypatch):
    monkeypatch.delattr(tyro._errors, "on_parse_error")
    assert main(argv.split()) == 2
    assert "selftrans sample --help" in " ".join(capsys.readouterr().err.split())


def test_tyro_with_other_events_prints_its_own_text(capsys, monkeypatch):
    fire = tyro._errors._fire
    monkeypatch.setattr(tyro._errors, "_fire", lambda event: fire(type(type(event).__name__, (), {})()))
    assert main(["sample"]) == 2
    assert "selftrans sample --help" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_suggestions_know_every_option_of_the_help_page(name, capsys):
    command = blank(COMMANDS[name])
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    names = [option for option in option_names(command) if option != "config"]
    assert names and all(f"--{option}" in printed for option in names)
    assert not {"recipe", "run-or-file", "source", "file"} & set(names)


def test_paragraphs_are_wrapped_and_tables_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = "  a   1\n  bb  2"
    text = f"One sentence that is longer than the terminal\nis wide.\n\nA table:\n{table}"
    assert wrapped(text) == f"One sentence that is longer than the\n  terminal is wide.\n\nA table:\n{table}"


def test_lines_of_a_list_continue_to_the_right_of_their_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = "  --a-name  what this command does, in more than one line"
    assert (
        wrapped(f"A list:\n{line}") == "A list:\n  --a-name  what this command does, in\n            more than one line"
    )


def test_a_sentence_that_two_spaces_end_is_no_name_of_a_list(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = "  This sentence is about as wide as it is.  It goes on with some more words."
    found = wrapped(f"A list:\n{line}").splitlines()
    assert len(found) == 3 and found[2].startswith("  ") and " ".join(found[1:]).split() == line.split()


@pytest.mark.parametrize("words", [[], ["train", "--help"], ["train", "digits", "--help"]])
def test_no_line_of_help_is_wider_than_the_terminal(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_options_are_described_on_lines_as_wide_as_the_page(capsys):
    """The strings below the fields are wrapped in the source; these line breaks are not those of the help page."""
    assert main(["prepare", "--help"]) == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("--label-column"))
    found = " ".join(lines[first : first + 6])
    assert "None: found by its name or type, in tables and tars if it holds integers" in found
    shortest = [len(line) for line in lines[first + 1 : first + 3]]
    assert min(shortest) > 40, "no line ends early"


def test_options_in_prose_are_not_broken_at_their_hyphens(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))
    assert wrapped("A run to a repository, or with option --dry-run to a folder.").endswith(
        "option\n  --dry-run to a folder."
    )
