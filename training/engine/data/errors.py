"""The errors of data that does not fit a model."""

from training.errors import UserError


class DataError(UserError):
    """The data cannot be used to train this model."""


class TemplateTooSlow(DataError):
    """The chat template exceeds the limits of `render_limit`. It does so for other rows, too."""

    def __init__(self) -> None:
        super().__init__(
            "The model's chat template needs too much time or memory. It may contain an endless "
            "loop; use another model, or shorter conversations.",
            field="model",
            code="template_too_slow",
        )
