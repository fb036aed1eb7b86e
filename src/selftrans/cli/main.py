"""The command `selftrans`: which of `commands.py` is meant, what is wrong with its arguments, and how it ended.

Exit status: 0 done, 1 an error said in one line, 2 wrong arguments, 75 stopped on notice with a checkpoint (run again).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import typing
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

VALUES = (tyro.conf.FlagConversionOff,)  #: overrides of a recipe are all written --a.b=c, also true and false


TRAIN = "train a recipe: stage 1, then stage 2; rerun = resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Every error a user can mend is one line on stderr."""
    from selftrans.train.signals import EXIT_RESUME, Interrupted

    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
    except Interrupted as stopped:
        print(f"selftrans: {stopped}", file=sys.stderr)
        return EXIT_RESUME
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"selftrans: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selftrans: interrupted; the same command continues", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _show_warning(message: Warning | str, category: Any, filename: str, lineno: int, *_: Any) -> None:
    """Our own warnings are one line for people; those of libraries keep quiet."""
    if issubclass(category, UserWarning) and "selftrans" in filename:
        print(f"selftrans: warning: {message}", file=sys.stderr)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] in ("-V", "--version"):
        from selftrans import __version__

        print(f"selftrans {__version__}")
        return
    name, rest = argv[0], argv[1:]
    from selftrans.cli.commands import COMMANDS

    if name == "train":
        _train(rest)
    elif name in COMMANDS:
        rest, overrides = _split_overrides(rest) if name == "compare" else (rest, [])
        options = [f.name.replace("_", "-") for f in dataclasses.fields(COMMANDS[name])]
        _check_flags(rest, [*options, *(f"no-{option}" for option in options)], "option", f"selftrans {name} --help")
        command = _parse(COMMANDS[name], rest, f"selftrans {name}")
        if name == "compare":
            beside = "those of selftrans compare --help"
            command.config = configured(command.recipe, overrides, name, ("out",), beside)
        command.run()
    else:
        raise _usage(f"command '{name}' is unknown", name, [*COMMANDS, "train"], "selftrans --help")


def _overview() -> str:
    from selftrans.cli.commands import COMMANDS

    lines = ["usage: selftrans COMMAND ...   (selftrans COMMAND --help teaches each)", ""]
    lines += [f"  {'train':<11} {TRAIN}"]
    lines += [f"  {name:<11} {inspect.getdoc(kind).splitlines()[0]}" for name, kind in COMMANDS.items()]  # type: ignore[union-attr]
    return "\n".join(lines)


def _usage(what: str, word: str, known: Sequence[str], where: str) -> SystemExit:
    """Print one line with the nearest known word and return the exit to raise."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    print(f"selftrans: {what}{f'; did you mean {close[0]}?' if close else ''} (see {where})", file=sys.stderr)
    return SystemExit(2)


def _check_flags(words: list[str], known: Sequence[str], what: str, where: str) -> None:
    """End with one line and the nearest name at the first `--flag` that is not known."""
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag[2:] not in [*known, "help"]:
            raise _usage(f"{what} {flag} is unknown", flag[2:], known, where)


def _parse(kind: Any, args: list[str], prog: str, default: Any = None, description: str | None = None) -> Any:
    """tyro, with its framed errors told in one line. With a `default`, the arguments are overrides of its fields."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=args, prog=prog)
            return tyro.cli(kind, args=args, prog=prog, default=default, description=description, config=VALUES)
    except SystemExit as stop:
        if stop.code:
            body = said.getvalue().split("─────\n")[-1] if "╭" not in said.getvalue() else said.getvalue()
            lines = [line.strip("│╭╮╰╯─ ") for line in body.splitlines() if not re.match(r"^[╭╰]", line)]
            end = next((i for i, line in enumerate(lines) if not line), len(lines))
            print(f"selftrans: {' '.join(lines[:end])} (see {prog} --help)", file=sys.stderr)
        raise


def _train(argv: list[str]) -> None:
    from selftrans.recipes import RECIPES, ignored
    from selftrans.train.run import train

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: selftrans train RECIPE --out RUN [--data DIR] [--teacher RUN_OR_FILE] [--a.b=c ...]\n")
        print("  " + TRAIN + "; `selftrans train RECIPE --help` lists every override\n")
        for name, function in RECIPES.items():
            print(f"  {name:<17} {(function.__doc__ or '').splitlines()[0]}")
        return
    options, rest = _own_options(argv[1:], ("data", "out", "teacher"))
    config = configured(argv[0], rest, "train", tuple(options), "--out RUN, --data DIR, --teacher RUN_OR_FILE")
    if "data" in options:
        config = config.override({"data.path": options["data"]})
    if "teacher" in options:
        config = _taught(config, options["teacher"])
    for said in ignored(config):
        warnings.warn(said, stacklevel=2)
    report = train(config, options["out"])
    if os.environ.get("RANK", "0") != "0":
        return
    total = "what the teacher's training took is unknown"  # it was imported
    if report["total_tflops"] is not None:
        sums = f"{report['total_tflops']:.3g} TFLOPs, {report['total_seconds']:.0f} s"
        total = f"with all stages and the teacher's training {sums}"
    steps, tflops = report["student_steps"], report["student_tflops"]
    print(f"done: {steps} student steps, {tflops:.3g} TFLOPs; {total} -> {options['out']}")


def _taught(config: Any, teacher: str) -> Any:
    """The configuration with a teacher given, where its method has one."""
    from selftrans.methods.registry import stages

    option = next((stage.teacher.option for stage in stages(config) if stage.teacher), None)
    if option is None:
        warnings.warn(f"--teacher is ignored: method {config.method} has no teacher", stacklevel=3)
        return config
    return config.override({option: teacher})


def configured(name: str, words: list[str], command: str, given: Sequence[str], beside: str) -> Any:
    """The recipe `name` with the overrides `words`, all of the form --a.b=c or --a.b c; `given` are options taken out before.

    What is unknown ends with one line and the nearest name, and so does a missing --out.
    """
    from selftrans.cli.overrides import overridden, override_type
    from selftrans.recipes import RECIPES

    if name not in RECIPES:
        raise _usage(f"recipe '{name}' is unknown", name, list(RECIPES), f"selftrans {command} --help")
    config = RECIPES[name]()
    kind, default = override_type(config, words)
    _check_flags(
        words,
        [*sorted(_dotted(kind)), *re.findall(r"--([a-z]+)", beside)],
        "override",
        f"selftrans {command} {name} --help",
    )
    if not {"-h", "--help"} & set(words) and "out" not in given:
        raise _usage("--out RUN is missing", "", [], f"selftrans {command} --help")
    about = f"{inspect.getdoc(RECIPES[name])}\n\nBeside the overrides: {beside}."
    return overridden(config, _parse(kind, words, f"selftrans {command} {name}", default, about))


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the rest, dotted overrides with their values)."""
    both: tuple[list[str], list[str]] = ([], [])
    dotted = False
    for word in argv:
        if word.startswith("--"):
            dotted = "." in word.partition("=")[0]
        both[dotted].append(word)
    return both


def _own_options(argv: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Take `--name value` and `--name=value` out of argv."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag[2:] in names and flag.startswith("--"):
            found[flag[2:]] = value if equals else next(words, "")
            if not found[flag[2:]] or found[flag[2:]].startswith("--"):
                raise _usage(f"{flag} needs a value", "", [], "selftrans train --help")
        else:
            rest.append(word)
    return found, rest


def _dotted(kind: Any, where: str = "") -> set[str]:
    """Every override that a configuration has, with dashes."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        dotted = f"{where}{name}".replace("_", "-")
        found |= _dotted(hint, f"{where}{name}.") if dataclasses.is_dataclass(hint) else {dotted}
    return found


if __name__ == "__main__":
    sys.exit(main())
