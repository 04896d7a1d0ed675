"""Words to a command, and its end to an exit status."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, cast

from cpseg.cli import annotate, calibrate, demo, filter, report, train  # noqa: A004 - its name
from cpseg.errors import CpsegError

__all__ = ["Command", "main"]

_WHAT = """\
Which classes each pixel can still have, with a guarantee that is stated
and true."""
_STATUS = """\
Each command has its own --help, with an example.

exit status:
  0    done
  1    done in part: some images could not be used, and are named
  2    the command or its input cannot be used; one line says what to do
  130  interrupted; nothing is left half-written
"""


class Command(Protocol):
    """What a module of a command holds."""

    SUMMARY: str
    """What it does, in a line."""

    EXAMPLE: str
    """What to type."""

    @property
    def add_arguments(self) -> Callable[[argparse.ArgumentParser], None]:
        """Declare its arguments."""
        ...

    @property
    def run(self) -> Callable[[argparse.Namespace], int]:
        """Do it; returns the exit status."""
        ...


_COMMANDS: dict[str, Command] = {
    "demo": cast("Command", demo),
    "annotate": cast("Command", annotate),
    "calibrate": cast("Command", calibrate),
    "filter": cast("Command", filter),
    "report": cast("Command", report),
    "train": cast("Command", train),
}


class _Parser(argparse.ArgumentParser):
    """A mistake in the words is one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None takes them from the process.

    Returns:
        The exit status: 0 done, 1 done in part, 2 refused (one line says why), 130 interrupted.

    Raises:
        SystemExit: 0 after ``--help``, 2 after words that are no command.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    given = _parser().parse_args(words, argparse.Namespace(words=words))
    try:
        return _COMMANDS[given.command].run(given)
    except KeyboardInterrupt:
        print("\ncpseg: interrupted; nothing is left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CpsegError, OSError, UnicodeError) as error:
        print(f"cpseg: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="cpseg", description=_WHAT, epilog=_STATUS, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=f"example:\n{command.EXAMPLE}",
            formatter_class=shape,
        )
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
