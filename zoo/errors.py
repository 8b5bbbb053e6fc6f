"""Errors that the caller can do something about."""


class InputError(ValueError):
    """A batch does not fit the model: its shape, its dtype or its range."""
