"""`python -m adapters.inference PORT`: answers on 127.0.0.1. INFERENCE_TOKEN is the word that
callers must know.
"""

import os
import sys
import threading
import traceback

import uvicorn

from adapters.inference.request_queue import Desk
from adapters.inference.server import make_app
from training.engine.fast_imports import fast_imports


def start_answering(desk: Desk) -> None:
    """Let the questions be answered, by a thread that wakes with the first one and imports torch
    only then.
    """
    threading.Thread(target=_answer, args=(desk,), name="speaker", daemon=True).start()


def _answer(desk: Desk) -> None:
    desk.wait()
    try:
        with fast_imports():
            from adapters.inference.scheduler import Speaker

        Speaker(desk).speak_for_ever()
    finally:
        traceback.print_exc()
        os._exit(70)  # nobody would answer any more; `up` starts the program again


if __name__ == "__main__":
    desk = Desk()
    start_answering(desk)
    uvicorn.run(
        make_app(desk, os.environ["INFERENCE_TOKEN"]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
