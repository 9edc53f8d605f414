"""These tests run only where they are asked for: ``-m third_party``."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "third_party" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="runs with -m third_party")
    for item in items:
        if item.get_closest_marker("third_party"):
            item.add_marker(skip)
