"""With more than 1,000 of everything, each page and each list of the API stays small and quick, and
every item can be reached.
"""

import re
from datetime import timedelta
from html import unescape
from urllib.parse import urljoin

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from adapters.export import hub
from adapters.models import AdapterVersion, Deployment, PromptSet, RequestLog, UsageCounter
from adapters.serving.gateway import list_deployment_models
from snapml_site.api import api
from tests.pages import normalize_markup
from training.datasets.models import Upload
from training.gpus.models import Allocation, Host
from training.jobs.models import Job, JobSubject
from training.people.models import ApiToken, Membership
from training.people.options import MAX_OPTIONS, SOURCES, list_options
from training.runs.models import Sweep

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_program")]
COUNT = 1100
MAX_BYTES = 300_000
MAX_QUERIES = 60


def copy_rows(row, **functions):
    """Save COUNT copies of a row. Each function makes a field of the number of the copy."""
    fields = {one.attname: getattr(row, one.attname) for one in row._meta.concrete_fields}
    copies = [
        type(row)(**{**fields, "id": None, **{name: make(n) for name, make in functions.items()}})
        for n in range(COUNT)
    ]
    return type(row)._base_manager.bulk_create(copies)


@pytest.fixture
def crowd(things, people, run, data, base_model, device, alice):
    """COUNT of everything. The admin is in all teams, and one team has all users."""
    now = timezone.now()
    admin = people["admin"]
    users = copy_rows(alice, username=lambda n: f"user-{n:04}")
    teams = copy_rows(run.team, name=lambda n: f"team-{n:04}")
    Membership.objects.bulk_create(Membership(team=team, user=admin, role="lead") for team in teams)
    Membership.objects.bulk_create(Membership(team=run.team, user=user) for user in users)
    ApiToken.objects.bulk_create(
        ApiToken(user=admin, name=f"token-{n:04}", digest=str(n), revoked_at=now)
        for n in range(COUNT)
    )
    models = copy_rows(base_model, name=lambda n: f"model-{n:04}")
    datasets = copy_rows(data.dataset, name=lambda n: f"data-{n:04}", owner_id=lambda _: admin.pk)
    versions = copy_rows(data, dataset_id=lambda n: datasets[n].pk)
    copy_rows(data, number=lambda n: n + 2)
    copy_rows(Upload.objects.get(), owner_id=lambda _: admin.pk, name=lambda n: f"draft-{n:04}")
    pools = copy_rows(device.pool, name=lambda n: f"pool-{n:04}", kind=lambda n: f"kind-{n:04}")
    hosts = Host.objects.bulk_create(
        Host(name=f"host-{n:04}", reported_at=now) for n in range(COUNT)
    )
    devices = copy_rows(device, host_id=lambda n: hosts[n].pk, uuid=lambda n: f"uuid-{n:04}")
    assert len({one.pool_id for one in devices}) == 1 and len(pools) == COUNT
    copy_rows(run, name=lambda n: f"queued-{n:04}")
    ended = copy_rows(
        run,
        name=lambda n: f"ended-{n:04}",
        owner_id=lambda _: admin.pk,
        state=lambda _: "finished",
        finished_at=lambda n: now - timedelta(milliseconds=n),
        base_model_id=lambda n: models[n].pk,
        data_id=lambda n: versions[n].pk,
        tags=lambda n: f",tag-{n:04},",
    )
    copy_rows(
        run,
        name=lambda n: f"latest-{n:04}",
        state=lambda _: "finished",
        owner_id=lambda n: users[n].pk,
    )
    Allocation.objects.bulk_create(
        Allocation(
            device=devices[n],
            run_id=ended[n].pk,
            run_name=ended[n].name,
            user=users[n],
            team=teams[n],
            priority="normal",
            started_at=now - timedelta(hours=1),
            released_at=None if n % 2 else now,
        )
        for n in range(COUNT)
    )
    adapter = AdapterVersion.objects.get(pk=things["adapter_id"])
    adapters = copy_rows(adapter, number=lambda n: n + 10, step=lambda n: n + 10)
    copy_rows(
        adapter,
        name=lambda n: f"child-{n:04}",
        step=lambda n: n + 5000,
        parent_id=lambda _: adapter.pk,
    )
    deployment = Deployment.objects.get()
    copy_rows(deployment, name=lambda n: f"deployed-{n:04}")
    copy_rows(
        deployment,
        name=lambda n: f"switchable-{n:04}",
        version_id=lambda _: adapters[0].pk,
        owner_id=lambda _: admin.pk,
    )
    UsageCounter.objects.bulk_create(
        UsageCounter(deployment=deployment, version=one, answers=5) for one in adapters
    )
    RequestLog.objects.bulk_create(
        RequestLog(deployment=deployment, version=adapters[n], at=now, seconds=1.0)
        for n in range(COUNT)
    )
    deployment.changes.bulk_create(
        deployment.changes.model(deployment=deployment, description=f"change-{n:04}")
        for n in range(COUNT)
    )
    pushes = Job.objects.bulk_create(
        Job(
            kind=hub.KIND,
            key=f"push {n}",
            state="failed",
            error=f"push-{n:04} failed.",
            params={"repository": f"alice/{n:04}"},
        )
        for n in range(COUNT)
    )
    JobSubject.objects.bulk_create(
        JobSubject(job=one, model="adapters.adapterversion", object_id=adapter.pk) for one in pushes
    )
    copy_rows(PromptSet.objects.get(), name=lambda n: f"prompts-{n:04}")
    copy_rows(Sweep.objects.get(), name=lambda n: f"sweep-{n:04}")
    return {**things, "admin": admin, "user_id": people["bob"].pk}


PAGES = (
    "/",
    "/?archived=1",
    "/status-bar",
    "/account",
    "/gpus",
    "/gpus/timeline",
    "/quotas",
    "/quotas/{pool_id}/{team_id}",
    "/audit",
    "/disk",
    "/data",
    "/data/{dataset_id}",
    "/data/versions/{version_id}/trained",
    "/models",
    "/runs/new",
    "/runs/new/models",
    "/runs/{run_id}",
    "/adapters",
    "/adapters/{adapter_id}",
    "/adapters/{adapter_id}/exports",
    "/adapters/import",
    "/adapters/compare?v={adapter_id}&v={other_id}",
    "/benchmarks/new",
    "/deployments",
    "/deployments/{name}",
    "/deployments/{name}/live",
    "/deployments/{name}/minutes",
    "/admin/people/team/{team_id}/change/",
    "/admin/people/team/{team_id}/delete/",
    "/admin/people/user/{user_id}/delete/",
    "/admin/people/user/{user_id}/change/",
    "/admin/people/membership/",
    "/admin/gpus/device/",
    "/admin/gpus/allocation/",
    "/admin/datasets/datasetversion/",
    "/admin/adapters/adapterversion/",
    "/admin/runs/run/",
)
API_LISTS = tuple(
    path
    for path, methods in api.get_openapi_schema()["paths"].items()
    if "Paged" in str(methods.get("get", {}).get("responses", {}).get(200))
)
API_ITEMS = (
    "/api/v1/people/me",
    "/api/v1/people/teams/{team_id}",
    "/api/v1/datasets/{dataset_id}",
    "/api/v1/gpus/disk",
    "/api/v1/adapters/{adapter_id}",
    "/api/v1/deployments/{name}",
)
# Each list: its page, the parameter of its pages, an item of the first page and one of the last
PAGED_LISTS = (
    ("/", "page", "latest-1099", "Lights, tiny"),
    ("/account", "members", "mallory", "user-1099"),
    ("/account", "tokens", "token-1099", "token-0000"),
    ("/gpus", "queue", "Lights, tiny", "queued-1099"),
    ("/gpus", "devices", "host-0020", "pool-1099"),
    ("/quotas", "page", "team-0000", "pool-1099"),
    ("/quotas", "users", "alice", "user-1099"),
    ("/disk", "teams", "team-0000", "team-1099"),
    ("/data", "page", "data-1099", "Lights"),
    ("/data", "drafts", "draft-1099", "draft-0000"),
    ("/data/{dataset_id}", "versions", "version=1100&", "version=1&"),
    ("/models", "page", "model-0000", "tiny-llama"),
    ("/adapters", "page", "Lights", "child-1099"),
    ("/adapters/{adapter_id}", "lineage", "child-0000", "child-1099"),
    ("/adapters/{adapter_id}", "deployed", "deployed-0000", "halve"),
    ("/adapters/{adapter_id}", "deployments", "switchable-0000", "switchable-1099"),
    ("/adapters/{adapter_id}", "pushes", "push-1099", "push-0000"),
    ("/adapters/{adapter_id}/exports", "pushes", "push-1099", "push-0000"),
    ("/deployments", "page", "deployed-0000", "switchable-1099"),
    ("/deployments/{name}", "previous", ">Lights v10<", ">Lights v1109<"),
    ("/deployments/{name}", "history", "change-1099", "change-0000"),
)
# Each source of options: a text, and an option that only a search shows
SEARCHES = (
    ("sharing-teams", "am-1099", "shared with team-1099"),
    ("ready-models", "el-1099", "model-1099"),
    ("offered-models", "el-1099", "model-1099"),
    ("dataset-versions", "TA-0000", "data-0000 v1"),
    ("pools", "ol-1099", "pool-1099"),
    ("run-models", "el-1099", "model-1099"),
    ("run-data", "ta-1099", "data-1099"),
    ("run-owners", "er-1099", "user-1099"),
    ("run-tags", "ag-1099", "tag-1099"),
    ("adapter-versions", "ld-1099", "child-1099 v1"),
    ("prompt-sets", "ts-0000", "prompts-0000"),
)


def list_faults(client, path):
    with CaptureQueriesContext(connection) as queries:
        response = client.get(path)
        size = len(response.getvalue())
    facts = {"status": response.status_code, "bytes": size, "queries": len(queries)}
    is_fine = response.status_code == 200 and size < MAX_BYTES and len(queries) < MAX_QUERIES
    return [] if is_fine else [(path, facts)]


def test_every_page_and_list_stays_small_with_a_thousand_of_everything(client, crowd):
    """One test for all, because the crowd takes seconds to create."""
    client.force_login(crowd["admin"])
    paths = [path.format(**crowd) for path in (*PAGES, *API_LISTS, *API_ITEMS)]
    assert not [fault for path in paths for fault in list_faults(client, path)]


def test_the_longest_page_of_an_api_list_needs_no_query_per_row(client, crowd):
    client.force_login(crowd["admin"])
    for path in API_LISTS:
        with CaptureQueriesContext(connection) as queries:
            answer = client.get(f"{path.format(**crowd)}?limit=200").json()
        assert len(queries) < 20, path
        assert len(answer["items"]) <= 200 and answer["count"] >= len(answer["items"])


def test_every_page_of_a_list_can_be_reached(client, crowd):
    client.force_login(crowd["admin"])
    for path, parameter, first, last in PAGED_LISTS:
        where = (path, parameter)
        page = client.get(path.format(**crowd)).content.decode()
        assert first in page and last not in page, where
        (link,) = re.findall(rf'href="([^"]*[?&;]{parameter}=2)">', page)
        second = client.get(urljoin(path.format(**crowd), unescape(link)))
        assert second.status_code == 200 and second.content.decode() != page, where
        page = client.get(path.format(**crowd), {parameter: 10**6}).content.decode()
        assert last in page and first not in page, where


def test_a_search_reaches_the_options_that_a_select_does_not_show(client, crowd):
    client.force_login(crowd["admin"])
    assert set(SOURCES) - {name for name, _, _ in SEARCHES} == {"run-methods"}  # which are few
    for name, text, label in SEARCHES:
        options = list_options(crowd["admin"], SOURCES[name])
        assert len(options.rows) == MAX_OPTIONS and options.has_more, name
        assert all(option.label != label for option in options.rows), name
        page = client.get(f"/options/{name}", {"q": text, "select": "it"}).content.decode()
        (value,) = re.findall(r'<option value="([^"]+)"', page)
        assert label in page, name
        page = client.get(f"/options/{name}", {"q": "", "select": "it", "it": value})
        assert f'<option value="{value}" selected' in normalize_markup(page), name
        page = client.get(f"/options/{name}", {"q": "nothing like it", "empty": "None"})
        assert re.findall(r'<option value="([^"]*)"', page.content.decode()) == [""], name


def test_the_search_of_the_account_page_finds_teams_and_members(client, crowd):
    client.force_login(crowd["admin"])
    page = client.get("/account?team=user-1099").content.decode()
    assert "user-1099" in page and "user-1098" not in page and "<h3>team-" not in page
    assert "<h3>team-1099</h3>" in client.get("/account?team=TEAM-1099").content.decode()


def test_the_page_of_a_new_token_links_to_pages_of_the_account(client, crowd):
    client.force_login(crowd["admin"])
    page = client.post("/account/tokens", {"name": "new", "days": "30"}).content.decode()
    assert 'href="/account?tokens=2"' in page and 'href="?' not in page


def test_the_list_of_openai_models_has_a_limit_and_each_is_found_by_name(crowd):
    listed = list_deployment_models(crowd["admin"])
    assert len(listed) == 1000
    assert "switchable-1099" not in {one["id"] for one in listed}
    assert list_deployment_models(crowd["admin"], "switchable-1099")[0]["id"] == "switchable-1099"


def test_the_chart_of_a_deployment_groups_the_versions_with_the_fewest_requests(client, crowd):
    client.force_login(crowd["admin"])
    chart = client.get("/deployments/halve/minutes").json()
    assert len(chart["labels"]) == 11
    assert chart["labels"]["null"] == "Other versions"
    assert sum(row["answers"] for row in chart["rows"]) == COUNT


# The rows of a dataset have always had pages
@pytest.mark.parametrize(
    "path", sorted({path for path, *_ in PAGED_LISTS} - {"/data/{dataset_id}"})
)
def test_a_short_list_has_neither_pages_nor_searches_of_options(client, things, people, path):
    client.force_login(people["admin"])
    page = client.get(path.format(**things)).content.decode()
    assert "pager" not in page
    assert "/options/" not in page
