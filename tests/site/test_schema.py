"""Fuzz test of the API with schemathesis: every response matches the OpenAPI schema, and none is a
5xx.
"""

import pytest
import schemathesis
from django.core.signals import request_finished, request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests import simulations
from training.engine.config import RunConfig
from training.errors import UserError
from training.people.tokens import create_token
from training.runs.forecast import memory_estimators

pytestmark = pytest.mark.django_db
FUZZ_SETTINGS = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", get_wsgi_application())


@pytest.fixture(autouse=True)
def no_other_services(monkeypatch, no_queue, no_program, tiny_model):
    """Disables file detection, name resolution and simulation. A simulation takes 6 s, so one
    result serves all generated models.
    """
    lora = RunConfig.from_dict({"method": "lora"}).to_dict()
    answer = simulations.simulate_request(
        {"model": str(tiny_model), "settings": lora, "device": "cpu"}
    )
    monkeypatch.setattr(
        memory_estimators.ANY_MODEL_PROCESS, "request_estimator", lambda _request: answer
    )

    def raise_user_error(*_args, **_kwargs):
        raise UserError("not here")

    monkeypatch.setattr("training.datasets.uploads.run_detection", raise_user_error)
    monkeypatch.setattr("training.webhooks.services.resolve_host", raise_user_error)


@pytest.fixture(autouse=True)
def keep_connection_open():
    """Django closes the database connection at the end of a request, but the test needs it."""
    signals = (request_started, request_finished)
    for signal in signals:
        signal.disconnect(close_old_connections)
    yield
    for signal in signals:
        signal.connect(close_old_connections)


@pytest.fixture
def secret(people):
    return create_token(people["admin"], "schema")[1]


@schema.parametrize()
@FUZZ_SETTINGS
def test_every_response_matches_the_schema(case, things, secret):
    # Half of the generated ids are replaced by those of existing objects
    for name, value in things.items():
        if name in case.path_parameters and hash(str(case.path_parameters[name])) % 2:
            case.path_parameters[name] = value
    case.call_and_validate(
        headers={"Authorization": f"Bearer {secret}", "Host": "localhost"}, checks=CHECKS
    )
