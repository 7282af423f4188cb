"""A filter for loggers whose records quote requests."""

import logging

MAX_ARGUMENT_LENGTH = 200


class ShorteningFilter(logging.Filter):
    """Shortens the arguments of a record: clients choose paths and Origins of 9,000 characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(shorten_argument, record.args))
        return True


def shorten_argument(argument: object) -> object:
    if isinstance(argument, str) and len(argument) > MAX_ARGUMENT_LENGTH:
        return f"{argument[:MAX_ARGUMENT_LENGTH]}..."
    return argument
