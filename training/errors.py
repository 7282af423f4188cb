"""Errors with a message for users. Pages, the API and workers turn a `UserError` into a page, a
JSON response or the message of a run. Does not import Django.

Every message says what is wrong, where, and what to do.
"""


class UserError(Exception):
    """An error that a person can fix. `status` is the HTTP status code, `field` the form field if
    there is one, and `code` identifies the reason when several errors share a class and a field.
    """

    status = 400

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class ConfigError(UserError):
    """A setting is invalid, or two settings contradict each other."""


class NotAllowed(UserError):
    """The user is signed in but has no permission for this action."""

    status = 403


class NotFound(UserError):
    """The object does not exist, or the user may not see it. Both cases give the same message on
    purpose.
    """

    status = 404


class Conflict(UserError):
    """The object exists, but its current state does not allow the action."""

    status = 409


class TooLarge(UserError):
    """More bytes, rows or characters than the limit in the message."""

    status = 413


def check_name_typed(typed: str, name: str) -> None:
    """Check that the user typed the object's name before it is deleted for good.

    Raises:
        UserError: a different name was typed.
    """
    if to_one_line(typed) != name:
        raise UserError(f"Type the name {name} to delete it.", field="name")


def to_one_line(text: str) -> str:
    """A name that is safe to store and display: control characters (NUL, line breaks, escapes)
    become spaces.
    """
    return "".join(c if c.isprintable() else " " for c in text).strip()
