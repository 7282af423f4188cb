"""The API for your user, your tokens, and teams."""

from datetime import datetime
from typing import Any

from ninja import Router, Schema, Status
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from training.errors import NotAllowed
from training.people import teams, tokens
from training.people.models import ApiToken, Role, Scope, Team, User
from training.people.pagination import Pagination
from training.people.requests import AuthenticatedRequest

router = Router(tags=["people"])
MAX_LISTED_TEAMS = 50


class MemberOut(Schema):
    username: str
    role: Role

    @staticmethod
    def resolve_username(row: Any) -> str:
        return str(row.user.username)


class TeamOut(Schema):
    id: int
    name: str
    members: list[MemberOut] = Field(
        description=f"the first {teams.MAX_LISTED_MEMBERS}; GET /people/teams/ID/members lists all"
    )

    @staticmethod
    def resolve_members(row: Team) -> Any:
        return getattr(row, "listed_members", [])  # a new team has none


class MeOut(Schema):
    id: int
    username: str
    admin: bool
    default_team_id: int | None
    teams: list[TeamOut] = Field(
        description=f"the first {MAX_LISTED_TEAMS}; GET /people/teams lists all"
    )

    @staticmethod
    def resolve_admin(row: User) -> bool:
        return row.is_superuser

    @staticmethod
    def resolve_teams(row: User) -> Any:
        own_teams = row.teams.order_by("name").prefetch_related(teams.prefetch_members())
        return list(own_teams[:MAX_LISTED_TEAMS])


class MeIn(Schema):
    model_config = ConfigDict(extra="forbid")
    default_team: int | None = Field(ge=0, le=2**53)


class TokenIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "notebook", "scope": "read"}]}
    )
    name: str = Field(max_length=80)
    scope: Scope = Scope.READ
    days: int | None = Field(None, ge=1, le=tokens.MAX_DAYS, description="until it expires")


class TokenOut(Schema):
    id: int
    name: str
    scope: Scope
    hint: str
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked: bool

    @staticmethod
    def resolve_revoked(row: ApiToken) -> bool:
        return row.revoked_at is not None


class SecretOut(Schema):
    id: int
    secret: str


class TeamIn(Schema):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=80)


class RoleIn(Schema):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"role": "member"}]})
    role: Role


def check_session_auth(request: AuthenticatedRequest) -> None:
    """Raises NotAllowed: the request is authenticated by a token, not by a session.

    A token must not create what outlives its revocation.
    """
    if getattr(request, "is_token_auth", False):
        raise NotAllowed("API tokens cannot do this. Sign in and use the account page.")


@router.get("/me", response=MeOut)
def read_me(request: AuthenticatedRequest) -> User:
    return request.user


@router.patch("/me", response=MeOut)
def update_me(request: AuthenticatedRequest, body: MeIn) -> User:
    """Choose the team that your new items are shared with. null keeps them private."""
    teams.set_sharing_team(request.user, body.default_team)
    return request.user


@router.get("/me/tokens", response=list[TokenOut])
@paginate(Pagination)
def list_tokens(request: AuthenticatedRequest) -> Any:
    return request.user.tokens.order_by("-created_at")


@router.post("/me/tokens", response={201: SecretOut})
def create_token(request: AuthenticatedRequest, body: TokenIn) -> Status[dict[str, Any]]:
    """Create a token. Only this response contains its secret. Needs a session: tokens cannot create
    tokens.
    """
    check_session_auth(request)
    token, secret = tokens.create_token(request.user, body.name, body.scope, days=body.days)
    return Status(201, {"id": token.pk, "secret": secret})


@router.delete("/me/tokens/{int:token_id}", response={204: None})
def revoke_token(request: AuthenticatedRequest, token_id: int) -> Status[None]:
    tokens.revoke_token(request.user, token_id)
    return Status(204, None)


@router.get("/teams", response=list[TeamOut])
@paginate(Pagination)
def list_teams(request: AuthenticatedRequest) -> Any:
    return teams.find_visible_teams(request.user).prefetch_related(teams.prefetch_members())


@router.post("/teams", response={201: TeamOut})
def create_team(request: AuthenticatedRequest, body: TeamIn) -> Status[Team]:
    """Admins only."""
    return Status(201, teams.create_team(request.user, body.name))


@router.get("/teams/{int:team_id}", response=TeamOut)
def read_team(request: AuthenticatedRequest, team_id: int) -> Team:
    return teams.get_team(request.user, team_id)


@router.get("/teams/{int:team_id}/members", response=list[MemberOut])
@paginate(Pagination)
def list_members(request: AuthenticatedRequest, team_id: int) -> Any:
    return teams.get_team(request.user, team_id).memberships.select_related("user")


@router.put("/teams/{int:team_id}/members/{username}", response=MemberOut)
def set_role(request: AuthenticatedRequest, team_id: int, username: str, body: RoleIn) -> Any:
    """Add a user to the team, or change their role. For leads of the team and admins."""
    return teams.set_role(request.user, teams.get_team(request.user, team_id), username, body.role)


@router.delete("/teams/{int:team_id}/members/{username}", response={204: None})
def remove_member(request: AuthenticatedRequest, team_id: int, username: str) -> Status[None]:
    teams.remove_member(request.user, teams.get_team(request.user, team_id), username)
    return Status(204, None)
