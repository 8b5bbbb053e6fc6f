"""Errors and warnings that the caller can do something about."""


class InputError(ValueError):
    """A batch does not fit the model: its shape, its dtype or its range."""


class WeightsError(RuntimeError):
    """A weights file is missing, damaged, unsafe, or does not belong to its record or its model."""


class ReinitializedWarning(UserWarning):
    """Parts of a pretrained model were left at random because they were asked to have another shape."""
