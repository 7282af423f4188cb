"""The launch form shows every setting that it reads back."""

import pytest

from training.engine.methods import METHODS
from training.runs.launch import settings_form


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_in_one_group(method):
    values = {"method": method}
    shown = [
        field.name
        for advanced in (False, True)
        for _, fields in settings_form.group_fields(values, advanced=advanced)
        for field in fields
    ]
    # A checkbox that is not shown would be read back as off.
    assert sorted(shown) == sorted(settings_form.build_fields(values))
