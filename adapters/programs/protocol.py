"""How these programs are asked and how they answer: an order in a folder, a JSON object a line on
stdout (adapters/jobs.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.child_environment import end_with_parent
from training.errors import UserError


def say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def run(act: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Do what the order in the folder argv[1] says; what a person can put right is told as its
    sentence.
    """
    # Asked to end, it cleans up; and a worker that dies takes it along, or a second one would soon
    # write to the same files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end_with_parent()
    order = json.loads((Path(sys.argv[1]) / "order.json").read_text())
    try:
        say(result=act(order))
    except UserError as error:
        say(error=error.message)
        return 65
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        say(error=f"The disk refused {Path(str(error.filename)).name}: {os.strerror(error.errno)}.")
        return 74
    return 0
