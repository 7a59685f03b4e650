"""The errors a user can meet; each says what was found, where, what was expected and what to do."""


class DcryoError(Exception):
    """Base of every error that dcryo raises on purpose."""


class InputError(DcryoError):
    """Bad input or options, found before work starts (exit status 2)."""


class RunError(DcryoError):
    """A run that could not be completed (exit status 1)."""
