"""Stores in SQL servers, which the tests start: the contract on each, and what is special about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from papaours_auth import open_async_store, open_store
from papaours_auth.stores import AsyncStore, Store
from papaours_auth.stores.sql import AsyncSQLStore, SQLStore
from papaours_auth.testing import StoreContract
from support.sql_servers import SQLServer

# the contract


class TestPostgreSQL(StoreContract):
    @pytest.fixture(autouse=True)
    def _database(self, postgresql_server: SQLServer) -> None:
        self.url = postgresql_server.url(postgresql_server.database())

    def open(self) -> Store:
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)


class TestMariaDB(StoreContract):
    @pytest.fixture(autouse=True)
    def _database(self, mariadb_server: SQLServer) -> None:
        self.url = mariadb_server.url(mariadb_server.database())

    def open(self) -> Store:
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)


class TestSQLiteBySQLAlchemy(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.url = f"sqlalchemy+sqlite:///{tmp_path}/keys.db"

    def open(self) -> Store:
        return open_store(self.url, create=True)

    def open_async(self) -> AsyncStore:
        return open_async_store(self.url)


class OwnEngine(StoreContract):
    """An app's own engine, with a prefix, and in PostgreSQL a schema."""

    url: str
    async_url: str
    schema: str | None = None

    @pytest.fixture(autouse=True)
    def _engine(self) -> Iterator[None]:
        self.engine: Engine = create_engine(self.url)
        yield
        self.engine.dispose()

    def open(self) -> Store:
        store = SQLStore(self.engine, prefix="auth_", schema=self.schema)
        store.create()
        return store

    def open_async(self) -> AsyncStore:
        engine = create_async_engine(self.async_url, poolclass=None)
        return Closing(engine, self.engine, prefix="auth_", schema=self.schema)


class Closing(AsyncSQLStore):
    """An app that closes its engine when it closes the store."""

    async def aclose(self) -> None:
        await super().aclose()
        await self._here().dispose()


class TestOwnEngineOnPostgreSQL(OwnEngine):
    schema = "papaours"

    @pytest.fixture(autouse=True)
    def _database(self, postgresql_server: SQLServer, _engine: None) -> None:
        pass

    @pytest.fixture(autouse=True)
    def _engine(self, postgresql_server: SQLServer) -> Iterator[None]:
        name = postgresql_server.database()
        postgresql_server.execute("create schema papaours authorization papaours", database=name)
        self.async_url = postgresql_server.url(name).replace("postgresql://", "postgresql+psycopg://")
        self.engine = create_engine(self.async_url)
        yield
        self.engine.dispose()
