"""``cpseg train``: a student, as a JSON file says."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from cpseg.cli.console import print_json
from cpseg.training import train_from_file

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "train a student as a JSON file says; every key is checked"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg train config.json --resume
"""
"""What to type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg train``."""
    parser.add_argument("config", type=Path, help="the JSON file")
    parser.add_argument("--resume", action="store_true", help="go on with the run in its directory")


def run(given: argparse.Namespace) -> int:
    """Train; 0 when done."""
    people = sys.stderr if given.json else sys.stdout
    result = train_from_file(
        given.config, resume=given.resume, report=lambda line: print(line, file=people)
    )
    if given.json:
        print_json(asdict(result))
    return 0
