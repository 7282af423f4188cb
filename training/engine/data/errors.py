"""The error of data that does not fit a model."""

from training.errors import UserError


class DataError(UserError):
    """The data cannot be used to train this model."""
