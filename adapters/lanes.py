"""The lanes of adapters' jobs."""

from training.jobs.kinds import Lane

PROGRAMS = Lane("programs", size=1)  # each loads a model
ANSWERS = Lane("answers", size=1)  # only asks the inference program, so it waits for no merge
