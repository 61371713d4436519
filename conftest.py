"""The examples in README.md and docs/ run as tests: a page that lies fails. And the suite's own plugin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from papaours_auth import Keys, open_store
from papaours_auth.digest import new_pepper

pytest_plugins = ["support.plugin"]


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `papaours-auth init`, `machine create` and `key create` leave behind. Gives the key."""
    folder = tmp_path_factory.mktemp("estate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PAPAOURS_STORE", f"sqlite:///{folder}/papaours.db")
        patch.setenv("PAPAOURS_PEPPER", new_pepper())
        open_store(f"sqlite:///{folder}/papaours.db", create=True).close()
        with Keys(f"sqlite:///{folder}/papaours.db") as keys:
            keys.create_machine(
                "Service de facturation", organisation="cfa-lyon", rights=["contrats:lecture"]
            )
            new = keys.create_key(
                "Service de facturation", name="Production - Service Facturation", environment="prod"
            )
        yield new.secret.reveal()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    fixtures=["estate"],
).pytest()
