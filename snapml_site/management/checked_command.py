"""The base of the commands that take texts or may fail for a reason that a person can fix."""

from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from training.errors import UserError, find_storage_error
from training.text_input import check_text


class CheckedCommand(BaseCommand):
    """Checks the text of all arguments (the shell passes bytes that are not UTF-8 as halves of
    surrogate pairs), and prints errors for users instead of a traceback.
    """

    def execute(self, *args: Any, **options: Any) -> Any:
        try:
            for name, value in options.items():
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str | Path):
                        check_text(str(text), name)
            return super().execute(*args, **options)
        except UserError as error:
            raise CommandError(error.message) from error
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        except Exception as error:
            storage_error = find_storage_error(error)
            if storage_error is None:
                raise
            raise CommandError(storage_error.message) from error
