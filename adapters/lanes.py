"""Lanes for the background jobs of adapters."""

from training.jobs.kinds import Lane

PROGRAMS = Lane("programs", size=1)  # one at a time, because each loads a model
ANSWERS = Lane("answers", size=1)  # only sends requests, so it need not wait for a merge
