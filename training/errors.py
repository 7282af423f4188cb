"""The errors that people read. It knows no Django: doors turn a `UserError` into a page, a JSON
answer or a run's reason.

Every message says what is wrong, where, and what to do.
"""


class UserError(Exception):
    """Something a person can put right. `status` is the HTTP code of the doors, `field` the form's
    field if there is one, `code` names the reason where several share class and field.
    """

    status = 400

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class ConfigError(UserError):
    """A setting that cannot be right, or two that contradict each other."""


class NotAllowed(UserError):
    """The person is known, but this is not theirs to do."""

    status = 403


class NotFound(UserError):
    """There is no such thing, or none that this person may see: the two read the same on
    purpose.
    """

    status = 404


class Conflict(UserError):
    """The thing exists, but its present state does not allow the act."""

    status = 409


class TooLarge(UserError):
    """More bytes, rows or characters than the limit that the message names."""

    status = 413


def check_name_typed(typed: str, name: str, action: str = "delete it") -> None:
    """Before something is lost for good, its name is typed once more.

    Raises:
        UserError: another name was typed.
    """
    if to_one_line(typed) != name:
        raise UserError(f"Type the name, {name}, to {action}.", field="name")


def to_one_line(text: str) -> str:
    """A name as it may be stored and shown: control characters (NUL, line breaks, escapes) become
    blanks.
    """
    return "".join(c if c.isprintable() else " " for c in text).strip()
