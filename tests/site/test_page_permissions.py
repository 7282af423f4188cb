"""The permissions of every page for every kind of user. A new page without an entry fails.

The operations of the API are in test_api_permissions.py.
"""

import pytest
from django.urls import get_resolver, reverse

from training.people.tokens import create_token
from training.runs.queue import admission

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_program")]
PUBLIC = {"sign-in", "sign-out", "health"}
# Pages that the owner, the team and admins may see.
OWNED = {
    "run",
    "run-header",
    "run-log",
    "run-memory-options",
    "run-files",
    "run-config",
    "run-csv",
    "run-parquet",
    "sweep",
    "dataset",
    "data-trained",
    "upload",
    "adapter",
    "adapter-download",
    "adapter-held-out",
    "adapter-try",
    "adapter-continue",
    "adapter-exports",
    "adapter-merged",
    "adapter-gguf-file",
    "deployment",
    "deployment-live",
    "deployment-minutes",
    "benchmark",
    "benchmark-export",
}
# Pages that change something: for the owner, leads of the team and admins.
CHANGING = {
    "run-stop",
    "run-continue",
    "run-edit",
    "run-archive",
    "run-delete",
    "run-priority",
    "run-memory-option",
    "run-up",
    "run-pool",
    "sweep-stop",
    "dataset-rename",
    "dataset-delete",
    "upload-map",
    "upload-save",
    "upload-remap",
    "upload-discard",
    "run-register",
    "adapter-edit",
    "adapter-delete",
    "adapters-prompts-delete",
    "adapter-merge",
    "adapter-gguf",
    "adapter-push",
    "deployment-switch",
    "deployment-roll-back",
    "deployment-delete",
    "benchmark-generate",
}
# Pages for every signed-in user; the content depends on the user.
SHARED = {
    "runs",
    "run-new",
    "run-summary",
    "run-measured",
    "run-costs",
    "run-memory",
    "run-models",
    "run-settings",
    "run-file",
    "run-compare",
    "runs-archive",
    "datasets",
    "dataset-new",
    "dataset-example",
    "models",
    "model",
    "model-add",
    "model-retry",
    "adapters",
    "adapters-compare",
    "adapters-answers",
    "adapters-generate",
    "adapters-weights",
    "adapters-vote",
    "adapters-vote-cast",
    "disk",
    "adapter-import",
    "deployments",
    "deployment-new",
    "benchmark-new",
    "password",
    "admin-password",
    "account",
    "token-new",
    "token-revoke",
    "team-new",
    "team-share",
    "team-role",
    "webhook-new",
    "webhook-remove",
    "guide-dismiss",
    "status-bar",
    "options",
    "gpus",
    "gpu-timeline",
}
# Pages for admins, and for leads about their teams.
LEADING = {"quotas", "quota", "quota-report", "audit", "audit-file"}
ADMINS = {"admin-login", "quota-pool", "quota-person", "gpu-return", "disk-user", "disk-team"}

# Other pages with a form, or that a form's fields are sent to.
POSTED = {
    "adapter-continue",
    "adapter-import",
    "adapter-try",
    "adapters-generate",
    "adapters-vote-cast",
    "adapters-weights",
    "benchmark-new",
    "dataset-example",
    "dataset-new",
    "deployment-new",
    "disk-team",
    "disk-user",
    "gpu-return",
    "guide-dismiss",
    "model-add",
    "model-retry",
    "password",
    "quota",
    "quota-person",
    "quota-pool",
    "run-costs",
    "run-file",
    "run-memory",
    "run-new",
    "run-settings",
    "run-summary",
    "runs-archive",
    "team-new",
    "team-role",
    "team-share",
    "token-new",
    "token-revoke",
    "webhook-new",
    "webhook-remove",
}


def list_pages():
    patterns = {}
    for pattern in get_resolver().url_patterns:
        for inner in getattr(pattern, "url_patterns", [pattern]):
            if getattr(pattern, "namespace", None) not in ("api", "admin"):
                patterns[inner.name] = inner.pattern
    return patterns


def page_url(name, things):
    from django.urls import reverse

    kwargs = {key: things[key] for key in list_pages()[name].converters}
    return reverse(name, kwargs=kwargs)


def test_every_page_is_in_the_table():
    assert set(list_pages()) == PUBLIC | OWNED | CHANGING | SHARED | LEADING | ADMINS


@pytest.mark.parametrize("name", sorted(OWNED | CHANGING | SHARED | LEADING | ADMINS))
def test_anonymous_users_are_redirected_to_sign_in(client, things, name):
    for send in (client.get, client.post):
        answer = send(page_url(name, things))
        assert answer.status_code == 302
        assert answer["Location"].startswith("/sign-in?next=/")


def test_fragments_redirect_the_whole_page_to_sign_in(client):
    for path in ("/status-bar", "/admin/", "/account?tab=tokens"):
        answer = client.get(path, HTTP_HX_REQUEST="true")
        assert (answer.status_code, answer["HX-Redirect"]) == (401, "/sign-in")


def test_the_admin_site_uses_the_same_sign_in_page_which_leads_back(client):
    for path in ("/admin/", "/admin/login/", "/admin/people/user/", "/admin/nothing"):
        answer = client.get(path)
        assert (answer.status_code, answer["Location"]) == (302, f"/sign-in?next={path}")
        answer = client.post(path, {"username": "admin", "password": "guess"})
        assert (answer.status_code, answer["Location"]) == (302, f"/sign-in?next={path}")
    assert client.get("/account?x=1")["Location"] == "/sign-in?next=/account%3Fx%3D1"


def test_public_pages_are_open_and_the_api_answers_401(client, db):
    assert client.get("/health").content == b"ok"
    assert client.get("/sign-in").status_code == 200
    assert client.post("/sign-out")["Location"] == "/sign-in"
    assert client.get("/api/v1/openapi.json").status_code == 200
    for path in ("/api/v1/runs", "/api/v1/adapters"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["field"]) == (401, "")
    assert client.get("/nothing").status_code == 404


def request_page(client, name, things):
    if name == "adapter-try":
        return client.post(
            page_url(name, things), content_type="application/json", data={"who": "base"}
        )
    return (client.post if name in CHANGING or name == "adapter-continue" else client.get)(
        page_url(name, things), {"pool": things["pool_id"], "priority": "background"}
    )


@pytest.mark.parametrize("name", sorted(OWNED))
def test_pages_are_visible_to_the_owner_the_team_and_admins(client, people, things, name):
    for who, can_see in (
        ("alice", True),
        ("bob", True),
        ("vera", True),
        ("lea", True),
        ("admin", True),
        ("mallory", False),
    ):
        client.force_login(people[who])
        assert (request_page(client, name, things).status_code == 404) is not can_see, who


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_changes_are_for_the_owner_leads_and_admins(client, people, things, name):
    for who, expected_status in (
        ("mallory", 404),
        ("vera", 403),
        ("bob", 403),
        ("lea", None),
        ("alice", None),
        ("admin", None),
    ):
        client.force_login(people[who])
        code = request_page(client, name, things).status_code
        assert code == expected_status if expected_status else code not in (403, 500), who
        if expected_status is None:
            break  # the change may have deleted it


@pytest.mark.parametrize("name", sorted(LEADING | ADMINS))
def test_quotas_and_the_audit_log_are_for_admins_and_leads(client, people, things, name):
    for who, is_lead in (
        ("alice", False),
        ("bob", False),
        ("vera", False),
        ("lea", True),
        ("admin", True),
    ):
        client.force_login(people[who])
        code = (client.post if name == "gpu-return" else client.get)(
            page_url(name, things)
        ).status_code
        is_allowed = who == "admin" or (is_lead and name in LEADING)
        assert code in ((200, 302) if is_allowed else (403,)), (who, code)


def test_leads_see_only_quotas_and_audit_entries_of_their_teams(client, people, things):
    from training.gpus import audit
    from training.people.models import Team

    voice, others = Team.objects.get(name="voice"), Team.objects.get(name="others")
    audit.record_entry(people["admin"], "quota", "voice in CPU", team=voice)
    audit.record_entry(people["admin"], "quota", "others in CPU", team=others)
    client.force_login(people["lea"])
    assert b"others in CPU" not in client.get("/audit").content
    assert b"voice in CPU" in client.get("/audit").content
    assert b"others" not in client.get("/quotas").content
    assert client.get(f"/quotas/{things['pool_id']}/{others.pk}").status_code == 404
    for action, code in (("hold", 302), ("lift", 302), ("save", 403), ("try", 403)):
        assert (
            client.post(f"/quotas/{things['pool_id']}/{voice.pk}", {"action": action}).status_code
            == code
        ), action
    assert (
        client.post(f"/quotas/{things['pool_id']}/{others.pk}", {"action": "hold"}).status_code
        == 404
    )


def test_the_admin_site_is_for_admins(client, people):
    for who, code in (("alice", 302), ("lea", 302), ("admin", 200)):
        client.force_login(people[who])
        assert client.get("/admin/").status_code == code, who


@pytest.mark.parametrize(
    "path",
    [
        "people/user",
        "people/team",
        "people/apitoken",
        "webhooks/webhook",
        "webhooks/delivery",
        "catalog/basemodel",
        "datasets/dataset",
        "datasets/datasetversion",
        "datasets/upload",
        "runs/run",
        "runs/sweep",
        "gpus/allocation",
        "gpus/auditentry",
        "gpus/device",
        "gpus/host",
        "gpus/personalquota",
        "gpus/pool",
        "gpus/quota",
        "adapters/adapterversion",
    ],
)
def test_the_admin_site_shows_no_secrets(client, people, things, path):
    token, secret = create_token(people["alice"], "x")
    client.force_login(people["admin"])
    page = client.get(f"/admin/{path}/")
    assert page.status_code == 200
    assert token.digest not in page.content.decode()
    assert secret not in page.content.decode()


@pytest.mark.parametrize("name", ["runs", "datasets", "adapters"])
def test_lists_show_only_visible_objects(client, people, things, name):
    visible = {}
    for who in ("alice", "mallory"):
        client.force_login(people[who])
        visible[who] = "Lights" in client.get(page_url(name, things)).content.decode()
    assert visible == {"alice": True, "mallory": False}


def test_the_status_bar_names_a_run_only_to_users_who_may_see_it(client, people, run):
    admission.admit_runs()
    for who, can_see in (("bob", True), ("mallory", False)):
        client.force_login(people[who])
        assert ("Lights, tiny" in client.get("/status-bar").content.decode()) is can_see


def test_fragments_do_not_load_the_layout(as_alice, run):
    part = as_alice.get("/", HTTP_HX_REQUEST="true")
    assert "bars" not in part.context
    for page in (
        as_alice.get("/"),
        as_alice.get("/", HTTP_HX_REQUEST="true", HTTP_HX_HISTORY_RESTORE_REQUEST="true"),
    ):
        assert "bars" in page.context and "Main" in page.content.decode()


def test_a_one_time_password_leads_to_the_password_form_and_fragments_stay_unchanged(
    as_alice, alice
):
    type(alice).objects.filter(pk=alice.pk).update(must_change_password=True)
    assert as_alice.get("/").url == reverse("password")
    assert "Old password" in as_alice.get(reverse("password")).content.decode()
    assert as_alice.get("/status-bar", HTTP_HX_REQUEST="true").status_code == 204


def test_tokens_of_users_with_a_one_time_password_are_rejected(client, alice):
    _, secret = create_token(alice, "x")
    alice.must_change_password = True
    alice.save()
    assert client.get("/api/v1/runs", HTTP_AUTHORIZATION=f"Bearer {secret}").status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/runs/%2e%2e%2f1",
        "/runs/1%00",
        "/data/..%2f..%2fetc",
        "/adapters/%252e%252e",
        "/static/../manage.py",
    ],
)
def test_path_traversal_is_not_found(as_alice, path):
    assert as_alice.get(path).status_code == 404


@pytest.mark.parametrize(
    "name",
    sorted((OWNED | SHARED | LEADING | ADMINS) - POSTED),
)
def test_a_page_that_only_shows_something_takes_no_post(client, people, things, name):
    client.force_login(people["admin"])
    assert client.post(page_url(name, things)).status_code == 405
