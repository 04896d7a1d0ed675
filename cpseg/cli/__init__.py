"""The command line: ``python -m cpseg``, also installed as ``cpseg``; a module per command.

Exit status: 0 done; 1 done in part, some images could not be used and are named; 2 the command or
its input cannot be used, one line says what to do; 130 interrupted.
"""

from cpseg.cli.program import main

__all__ = ["main"]
