"""`run_queued`: a worker should look at this run. `run_changed`: browsers that show it should hear
of it.

Both may be lost without harm: workers sweep every few seconds, web servers look for themselves.
They only make it faster.
"""

from __future__ import annotations

from django.dispatch import Signal

run_queued = Signal()  # run_id
run_changed = Signal()  # run_id
