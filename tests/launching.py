"""Launches of the tests: what a person would be warned of is accepted."""

from training.runs.launch.request import LaunchRequest, launch_runs


def launch_run(user, **request):
    return launch_runs(LaunchRequest(user=user, **request), accept_warnings=True)
