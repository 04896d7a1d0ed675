"""``cpseg annotate``: a folder of images to a cache of logits."""

import argparse
import json

from cpseg.annotators import CachedAnnotator, folder
from cpseg.cli.console import print_json, progress

__all__ = ["EXAMPLE", "SUMMARY", "add_arguments", "run"]

SUMMARY = "put the logits of a folder of images into a cache; goes on where it stopped"
"""What it does, in a line."""

EXAMPLE = """\
  python -m cpseg annotate photos --classes classes.txt \\
      --model seem_focalt_v1.pt --background background --cache logits
"""
"""What to type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``cpseg annotate``."""
    folder.add_arguments(parser)


def run(given: argparse.Namespace) -> int:
    """Do what the command line says; 1 if an image could not be read, 130 if stopped."""
    status = folder.run(given, lambda paths: progress(paths, "annotate"))
    if given.json:
        index = given.cache / "images.json"
        images = len(json.loads(index.read_text("utf-8"))) if index.exists() else 0
        source = CachedAnnotator(given.cache).source
        print_json({"cache": str(given.cache), "images": images, "source": source})
    return status
