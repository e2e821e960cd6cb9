from __future__ import annotations

import pytest

from tests.ops.drawing import device_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs on a GPU, so that `-m gpu` finds it."""
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and device_of(name).type == "cuda":
            item.add_marker("gpu")
