"""What cpseg raises. Each class is also the builtin a caller would expect."""


class CpsegError(Exception):
    """Anything cpseg refuses to do, in one line that says what to do instead."""


class InputError(CpsegError, ValueError):
    """An argument breaks a rule: the message names it, the rule and what was given."""


class StateError(CpsegError, RuntimeError):
    """An accumulator was asked for something its state rules out."""


class FileError(CpsegError, ValueError):
    """A file is damaged, of another kind, or of a version this cpseg does not know."""


class MissingExtraError(CpsegError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""
