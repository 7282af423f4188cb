"""`python -m adapters.inference PORT`: answers on 127.0.0.1. INFERENCE_TOKEN is the word that callers must know."""

import os
import sys

import uvicorn

from adapters.inference.desk import Desk
from adapters.inference.server import make_app

if __name__ == "__main__":
    desk = Desk()
    desk.open()
    uvicorn.run(
        make_app(desk, os.environ["INFERENCE_TOKEN"]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
