"""``python -m cpseg``."""

from cpseg.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
