"""Subclasses of Event in sessions; they are run apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import apart
from tests.conftest import Server

CASES = Path(__file__).with_name("subclass_cases.py")


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, str]:
    return apart.outcomes(CASES, PGEBUS_TEST_URL=server.url.render_as_string(hide_password=False))


@pytest.mark.parametrize("name", apart.cases(CASES))
def test_apart(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""
