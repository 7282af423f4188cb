"""Put versions into use under a stable name: deploy, switch, share traffic, roll back, take down.
It knows no HTTP, no torch.
"""

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


@dataclass(frozen=True)
class Routing:
    """Who answers under a name: a version, perhaps another with `canary_percent` per cent of the traffic,
    merged where possible.
    """

    version: AdapterVersion
    canary: AdapterVersion | None = None
    canary_percent: int = 0
    use_merged: bool = True


def create_deployment(user: User, name: str, routing: Routing) -> Deployment:
    """A new name that answers at once; merging goes on in the background.

    Raises:
        UserError: a name or a share that cannot be. Conflict: the name is taken. NotAllowed: they
            only view the version's team.
    """
    name = to_one_line(name)
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            "A name has 1 to 63 small letters, digits and hyphens, such as smart-home.",
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
            f"The name {name} is taken; choose another, or switch that deployment.", field="name"
        ) from error
    start_merges(user, routing)
    return deployment


def switch_deployment(
    user: User, deployment: Deployment, routing: Routing, *, description: str = ""
) -> Deployment:
    """Let other versions answer from the next request on. What is being answered is answered to its
    end by the old ones.

    Raises:
        NotAllowed: the deployment is not theirs to change. UserError: a share that cannot be.
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
    """Raises Conflict: a team would be answered by a version that is not the team's, and that its
    members may not see.
    """
    for version in filter(None, (routing.version, routing.canary)):
        if team is not None and version.team_id != team.pk:
            raise Conflict(
                f"{version} does not belong to team {team}, whose deployment this is.",
                field="version",
            )


def roll_back(user: User, deployment: Deployment) -> Deployment:
    """Back to what answered before the last change, which is a change of its own: rolling back
    twice goes forth again.

    Raises:
        Conflict: there is nothing to go back to, or it has been deleted.
    """
    check_changeable(user, deployment)
    deployment.refresh_from_db()
    previous_change = find_previous_change(deployment)
    if previous_change is None:
        raise Conflict(
            f"{deployment.name} has had no other version that is still there.",
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
    """The newest change that let something else answer than what does now."""
    current = current_routing(deployment)
    changes = deployment.changes.select_related(
        "version__base_model", "canary__base_model"
    ).exclude(version=None)[:MAX_CHANGES]
    return next((one for one in changes if current_routing(one) != current), None)


def current_routing(one: Deployment | DeploymentChange) -> tuple[int | None, int | None, int, bool]:
    """A share without a second version, which may have been deleted, is none."""
    return one.version_id, one.canary_id, one.canary_percent if one.canary_id else 0, one.use_merged


def delete_deployment(user: User, deployment: Deployment, name: str) -> None:
    """Delete a deployment: its name answers no more.

    Raises:
        UserError: `name` is not its name.
    """
    check_changeable(user, deployment)
    check_name_typed(name, deployment.name, "take it down")
    deployment.delete()


def check_routing(user: User, routing: Routing) -> None:
    """Versions they may see, in a team that they do more than view, and a share that makes
    sense.
    """
    for version in filter(None, (routing.version, routing.canary)):
        get_visible(AdapterVersion, user, version.pk)
        is_owner = version.owner_id == user.pk or user.is_superuser
        if (
            not is_owner
            and not user.memberships.filter(team=version.team).exclude(role=Role.VIEWER).exists()
        ):
            raise NotAllowed(
                f"You only view what team {version.team} has; ask a lead to make you a member to "
                "deploy it."
            )
    if routing.canary is None and routing.canary_percent:
        raise UserError(
            "Choose the second version that gets this share.", field="canary", code="no_second"
        )
    if routing.canary is not None and not 1 <= routing.canary_percent <= 99:
        raise UserError(
            "The second version's share must be from 1 to 99 per cent.", field="canary_percent"
        )
    if routing.canary is not None and routing.canary.pk == routing.version.pk:
        raise UserError(
            "The two versions that share the traffic are the same; choose another.",
            field="canary",
            code="same_version",
        )


def start_merges(user: User, routing: Routing) -> None:
    """Start what is to be merged and can be."""
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


def describe_routing(routing: Routing) -> str:
    suffix = f", {routing.canary_percent} % of it to {routing.canary}" if routing.canary else ""
    return f"{routing.version}{suffix}"


def pick_version(deployment: Deployment) -> AdapterVersion:
    """The version that answers the next request."""
    if deployment.canary is not None and random.randrange(100) < deployment.canary_percent:
        return deployment.canary
    return deployment.version
