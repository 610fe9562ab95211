"""Subclasses of Event in a running system, and the guide that explains them; they are run apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import apart
from tests.conftest import Server

FILES = [Path(__file__).with_name(f"{name}_cases.py") for name in ("subclassed_event", "subclassing_guide")]


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, str]:
    url = server.url.render_as_string(hide_password=False)
    return {name: outcome for file in FILES for name, outcome in apart.outcomes(file, PGEBUS_TEST_URL=url).items()}


@pytest.mark.parametrize("name", [name for file in FILES for name in apart.cases(file)])
def test_apart(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
