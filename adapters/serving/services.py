"""Deploy versions under stable names: create, switch, split traffic, roll back, delete."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from django.db import IntegrityError, transaction

from adapters.export import merge as export_merge
from adapters.models import AdapterVersion, Deployment, DeploymentChange
from training.errors import Conflict, NotAllowed, UserError, check_name_typed, to_one_line
from training.people.models import Role, Team, User
from training.people.permissions import check_changeable, get_visible

MAX_CHANGES = 200
NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

CANARY_PERCENT_MESSAGE = "The canary's traffic share must be from 1% to 99%."


@dataclass(frozen=True)
class Routing:
    """What a deployment serves: a version, and optionally a canary that gets `canary_percent`
    percent of the traffic. `use_merged` serves merged models where possible.
    """

    version: AdapterVersion
    canary: AdapterVersion | None = None
    canary_percent: int = 0
    use_merged: bool = True


def create_deployment(user: User, name: str, routing: Routing) -> Deployment:
    """Create a deployment, which works at once; merging continues in the background.

    Raises:
        UserError: an invalid name or traffic share.
        Conflict: the name is in use.
        NotAllowed: the user is only a viewer of the version's team.
    """
    name = to_one_line(name)
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            "A name has 1 to 63 lowercase letters, digits and hyphens, e.g. smart-home.",
            field="name",
        )
    check_routing(user, routing)
    version = routing.version
    check_team_versions(version.team, routing)
    try:
        with transaction.atomic():
            deployment = Deployment.objects.create(
                owner=user,
                team=version.team,
                name=name,
                version=version,
                canary=routing.canary,
                canary_percent=routing.canary_percent,
                use_merged=routing.use_merged,
            )
            record_change(user, deployment, f"Deployed {describe_routing(routing)}.")
    except IntegrityError as error:
        raise Conflict(
            f"The name {name} is already in use. Choose another, or switch that deployment.",
            field="name",
        ) from error
    start_merges(user, routing)
    return deployment


def switch_deployment(
    user: User, deployment: Deployment, routing: Routing, *, description: str = ""
) -> Deployment:
    """Serve other versions from the next request on. Requests in progress finish with the old ones.

    Raises:
        NotAllowed: the user may not change the deployment.
        UserError: an invalid traffic share.
    """
    check_changeable(user, deployment)
    check_routing(user, routing)
    check_team_versions(deployment.team, routing)
    with transaction.atomic():
        current: Deployment = Deployment.objects.select_for_update().get(pk=deployment.pk)
        current.version, current.canary = routing.version, routing.canary
        current.canary_percent, current.use_merged = routing.canary_percent, routing.use_merged
        current.save(update_fields=["version", "canary", "canary_percent", "use_merged"])
        record_change(user, current, description or f"Switched to {describe_routing(routing)}.")
    start_merges(user, routing)
    return current


def check_team_versions(team: Team | None, routing: Routing) -> None:
    """Raises Conflict for a version that does not belong to the deployment's team, whose members
    might not be allowed to see it.
    """
    for version in filter(None, (routing.version, routing.canary)):
        if team is not None and version.team_id != team.pk:
            raise Conflict(
                f"{version} does not belong to team {team}, which owns this deployment.",
                field="version",
            )


def roll_back(user: User, deployment: Deployment) -> Deployment:
    """Return to the routing before the last change. This is itself a change, so rolling back twice
    undoes the rollback.

    Raises:
        Conflict: there is no earlier routing, or its version was deleted.
    """
    check_changeable(user, deployment)
    deployment.refresh_from_db()
    previous_change = find_previous_change(deployment)
    if previous_change is None:
        raise Conflict(
            f"{deployment.name} has no previous version to roll back to.",
            code="no_other_version",
        )
    assert previous_change.version is not None
    routing = Routing(
        previous_change.version,
        previous_change.canary,
        previous_change.canary_percent if previous_change.canary else 0,
        previous_change.use_merged,
    )
    return switch_deployment(
        user, deployment, routing, description=f"Rolled back to {describe_routing(routing)}."
    )


def find_previous_change(deployment: Deployment) -> DeploymentChange | None:
    """The newest change whose routing differs from the current one."""
    current = get_routing_key(deployment)
    changes = deployment.changes.select_related(
        "version__base_model", "canary__base_model"
    ).exclude(version=None)[:MAX_CHANGES]
    return next((one for one in changes if get_routing_key(one) != current), None)


def get_routing_key(one: Deployment | DeploymentChange) -> tuple[int | None, int | None, int, bool]:
    """The routing as a comparable tuple. Without a canary, which may have been deleted, the
    share is 0.
    """
    return one.version_id, one.canary_id, one.canary_percent if one.canary_id else 0, one.use_merged


def delete_deployment(user: User, deployment: Deployment, name: str) -> None:
    """Delete a deployment; requests to its name fail from then on.

    Raises:
        UserError: `name` is not its name.
    """
    check_changeable(user, deployment)
    check_name_typed(name, deployment.name)
    deployment.delete()


def check_routing(user: User, routing: Routing) -> None:
    """Check that the user may deploy the versions and that the traffic share is valid."""
    for version in filter(None, (routing.version, routing.canary)):
        get_visible(AdapterVersion, user, version.pk)
        is_owner = version.owner_id == user.pk or user.is_superuser
        if (
            not is_owner
            and not user.memberships.filter(team=version.team).exclude(role=Role.VIEWER).exists()
        ):
            raise NotAllowed(
                f"You are a viewer of team {version.team}. Ask a team lead to make you a member "
                "to deploy its versions."
            )
    if routing.canary is None and routing.canary_percent:
        raise UserError(
            "Choose a canary version for this traffic share.", field="canary", code="no_canary"
        )
    if routing.canary is not None and not 1 <= routing.canary_percent <= 99:
        raise UserError(
            CANARY_PERCENT_MESSAGE,
            field="canary_percent",
        )
    if routing.canary is not None and routing.canary.pk == routing.version.pk:
        raise UserError(
            "The two versions must be different.",
            field="canary",
            code="same_version",
        )


def start_merges(user: User, routing: Routing) -> None:
    """Start the merges that the routing asks for and that the methods support."""
    for version in filter(None, (routing.version, routing.canary)):
        if routing.use_merged and not version.method_spec.merge_unsupported_reason:
            export_merge.merge_version(user, version)


def record_change(user: User, deployment: Deployment, description: str) -> None:
    DeploymentChange.objects.create(
        deployment=deployment,
        by=user,
        version=deployment.version,
        canary=deployment.canary,
        label=str(deployment.version)[:140],
        canary_label=str(deployment.canary)[:140] if deployment.canary else "",
        canary_percent=deployment.canary_percent,
        use_merged=deployment.use_merged,
        description=description[:200],
    )


def describe_routing(routing: Routing | Deployment) -> str:
    if routing.canary is None:
        return str(routing.version)
    percent = routing.canary_percent
    return f"{routing.version}, with {percent}% of the traffic to {routing.canary}"


def pick_version(deployment: Deployment) -> AdapterVersion:
    """Choose the version for the next request at random, weighted by the traffic share."""
    if deployment.canary is not None and random.randrange(100) < deployment.canary_percent:
        return deployment.canary
    return deployment.version
