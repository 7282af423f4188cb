"""Signals of runs. `run_queued`: a worker should check this run. `run_changed`: browsers that show
this run should update.

Both only reduce latency and may be lost: workers check for runs every few seconds, and web servers
poll the database.
"""

from __future__ import annotations

from django.dispatch import Signal

run_queued = Signal()  # run_id
run_changed = Signal()  # run_id
