"""pytest-alembic's own tests over our branch: one head, every revision up and down, models and migrations in step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.config import Config
from pytest_alembic.tests import (  # noqa: F401 - to be collected here
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)
from sqlalchemy import Engine, create_engine

from pgebus.settings import DatabaseSettings


@pytest.fixture
def alembic_config(empty_database: DatabaseSettings) -> Config:
    """Our own environment, which finds the database by its settings."""
    config = Config()
    config.set_main_option("script_location", "pgebus:migrations")
    config.attributes["pgebus_settings"] = empty_database
    return config


@pytest.fixture
def alembic_engine(empty_database: DatabaseSettings) -> Iterator[Engine]:
    """A synchronous engine on the same database."""
    engine = create_engine(empty_database.sqlalchemy_url().set(drivername="postgresql+psycopg"))
    yield engine
    engine.dispose()
