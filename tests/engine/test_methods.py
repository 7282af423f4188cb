from training.engine.config import METHODS
from training.engine.methods import TABLE


def test_the_table_and_the_config_name_the_same_methods():
    assert set(TABLE) == set(METHODS)
    assert all(method.title and method.paper.startswith("https://") for method in TABLE.values())
