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
from training.errors import Conflict, NotAllowed, UserError, check_name_typed, one_line
from training.people.models import Role, Team, User
from training.people.visible import get_visible, may_change

MOST_CHANGES = 200
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Answering:
    """Who answers under a name: a version, perhaps another with `share` per cent of the traffic,
    merged where possible.
    """

    version: AdapterVersion
    other: AdapterVersion | None = None
    share: int = 0
    merge: bool = True


def deploy(user: User, name: str, answering: Answering) -> Deployment:
    """A new name that answers at once; merging goes on in the background.

    Raises:
        UserError: a name or a share that cannot be. Conflict: the name is taken. NotAllowed: they
            only view the version's team.
    """
    name = one_line(name)
    if not NAME.fullmatch(name):
        raise UserError(
            "A name has 1 to 63 small letters, digits and hyphens, such as smart-home.",
            field="name",
        )
    check(user, answering)
    version = answering.version
    refuse_foreign(version.team, answering)
    try:
        with transaction.atomic():
            made = Deployment.objects.create(
                owner=user,
                team=version.team,
                name=name,
                version=version,
                other=answering.other,
                share=answering.share,
                merge=answering.merge,
            )
            note(user, made, f"Deployed {words_of(answering)}.")
    except IntegrityError as error:
        raise Conflict(
            f"The name {name} is taken; choose another, or switch that deployment.", field="name"
        ) from error
    begin_merges(user, answering)
    return made


def switch(
    user: User, deployment: Deployment, answering: Answering, *, words: str = ""
) -> Deployment:
    """Let other versions answer from the next request on. What is being answered is answered to its
    end by the old ones.

    Raises:
        NotAllowed: the deployment is not theirs to change. UserError: a share that cannot be.
    """
    may_change(user, deployment)
    check(user, answering)
    refuse_foreign(deployment.team, answering)
    with transaction.atomic():
        now: Deployment = Deployment.objects.select_for_update().get(pk=deployment.pk)
        now.version, now.other = answering.version, answering.other
        now.share, now.merge = answering.share, answering.merge
        now.save(update_fields=["version", "other", "share", "merge"])
        note(user, now, words or f"Switched to {words_of(answering)}.")
    begin_merges(user, answering)
    return now


def refuse_foreign(team: Team | None, answering: Answering) -> None:
    """Raises Conflict: a team would be answered by a version that is not the team's, and that its
    members may not see.
    """
    for version in filter(None, (answering.version, answering.other)):
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
    may_change(user, deployment)
    deployment.refresh_from_db()
    before = previous(deployment)
    if before is None:
        raise Conflict(
            f"{deployment.name} has had no other version that is still there.",
            code="no_other_version",
        )
    assert before.version is not None
    answering = Answering(
        before.version, before.other, before.share if before.other else 0, before.merge
    )
    return switch(user, deployment, answering, words=f"Rolled back to {words_of(answering)}.")


def previous(deployment: Deployment) -> DeploymentChange | None:
    """The newest change that let something else answer than what does now."""
    now = answering_now(deployment)
    changes = deployment.changes.select_related("version__base_model", "other__base_model").exclude(
        version=None
    )[:MOST_CHANGES]
    return next((one for one in changes if answering_now(one) != now), None)


def answering_now(one: Deployment | DeploymentChange) -> tuple[int | None, int | None, int, bool]:
    """A share without a second version, which may have been deleted, is none."""
    return one.version_id, one.other_id, one.share if one.other_id else 0, one.merge


def take_down(user: User, deployment: Deployment, name: str) -> None:
    """Delete a deployment: its name answers no more.

    Raises:
        UserError: `name` is not its name.
    """
    may_change(user, deployment)
    check_name_typed(name, deployment.name, "take it down")
    deployment.delete()


def check(user: User, answering: Answering) -> None:
    """Versions they may see, in a team that they do more than view, and a share that makes
    sense.
    """
    for version in filter(None, (answering.version, answering.other)):
        get_visible(AdapterVersion, user, version.pk)
        theirs = version.owner_id == user.pk or user.is_superuser
        if (
            not theirs
            and not user.memberships.filter(team=version.team).exclude(role=Role.VIEWER).exists()
        ):
            raise NotAllowed(
                f"You only view what team {version.team} has; ask a lead to make you a member to "
                "deploy it."
            )
    if answering.other is None and answering.share:
        raise UserError(
            "Choose the second version that gets this share.", field="other", code="no_second"
        )
    if answering.other is not None and not 1 <= answering.share <= 99:
        raise UserError("The second version's share must be from 1 to 99 per cent.", field="share")
    if answering.other is not None and answering.other.pk == answering.version.pk:
        raise UserError(
            "The two versions that share the traffic are the same; choose another.",
            field="other",
            code="same_version",
        )


def begin_merges(user: User, answering: Answering) -> None:
    """Start what is to be merged and can be."""
    for version in filter(None, (answering.version, answering.other)):
        if answering.merge and not version.method_row.merge_unsupported_reason:
            export_merge.merge_version(user, version)


def note(user: User, deployment: Deployment, words: str) -> None:
    DeploymentChange.objects.create(
        deployment=deployment,
        by=user,
        version=deployment.version,
        other=deployment.other,
        label=str(deployment.version)[:140],
        other_label=str(deployment.other)[:140] if deployment.other else "",
        share=deployment.share,
        merge=deployment.merge,
        words=words[:200],
    )


def words_of(answering: Answering) -> str:
    shared = f", {answering.share} % of it to {answering.other}" if answering.other else ""
    return f"{answering.version}{shared}"


def drawn(deployment: Deployment) -> AdapterVersion:
    """The version that answers the next request."""
    if deployment.other is not None and random.randrange(100) < deployment.share:
        return deployment.other
    return deployment.version
