from __future__ import annotations

import pytest

from fastgen import registry
from tests.training.tiny_models import ENTRIES


@pytest.fixture(autouse=True, scope="package")
def _tiny_models():
    """The small models have names while these tests run."""
    registry.names()
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in ENTRIES.items():
            patch.setitem(registry._entries, name, entry)
        yield
