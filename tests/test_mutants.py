"""The tool behind ``make mutants``: which changes it makes, how it makes them, and its list of known ones."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType

import pytest

from mutants.__main__ import report
from mutants.asking import give_other_code
from mutants.changes import Change, changes_of
from mutants.known import read_known
from mutants.nursery import SOURCES, Verdict
from papaours_auth import names

SOURCE = b'''"""A docstring is left alone."""
LIMIT: Final = 16
KINDS = {"a", "b"}

class Sieve:
    def lets(self, x, *, strict=True):
        """So is this one."""
        if x < LIMIT and not self.full:
            self.note(x)
        return min(x, LIMIT)
'''
EXPECTED = [
    "2 -: 16 -> 17",
    '3 -: {"a", "b"} -> {"a"}',
    '3 -: {"a", "b"} -> {"b"}',
    "3 -: \"a\" -> 'XXa'",
    "3 -: \"b\" -> 'XXb'",
    "6 Sieve.lets: True -> False",
    "8 Sieve.lets: x < LIMIT -> x <= LIMIT",
    "8 Sieve.lets: x < LIMIT and not self.full -> True and not self.full",
    "8 Sieve.lets: x < LIMIT and not self.full -> x < LIMIT and True",
    "8 Sieve.lets: x < LIMIT and not self.full -> x < LIMIT or not self.full",
    "8 Sieve.lets: not self.full -> bool(self.full)",
    "9 Sieve.lets: self.note(x) -> pass",
    "10 Sieve.lets: min(x, LIMIT) -> max(x, LIMIT)",
    "10 Sieve.lets: return min(x, LIMIT) -> return None",
]


def test_each_operator_makes_its_change_and_no_other() -> None:
    made = changes_of("sieve.py", SOURCE)
    assert sorted(
        f"{change.line} {change.where or '-'}: {change.old} -> {change.new}" for change in made
    ) == sorted(EXPECTED)
    for change in made:
        changed = change.applied(SOURCE)
        assert changed != SOURCE
        assert bool(len(change.lines)) is (
            change.line > 6
        )  # what runs when the module is imported has no lines


def test_changes_that_read_alike_have_names_of_their_own() -> None:
    for module in ("verify.py", "cache.py", "_middleware.py"):
        made = [change.name for change in changes_of(module, (SOURCES / module).read_bytes())]
        assert len(set(made)) == len(made)


def test_a_living_function_is_given_other_code() -> None:
    source = Path(str(names.__file__)).read_bytes()
    (change,) = [change for change in changes_of("names.py", source) if change.old == "not telling"]
    clear, function = "Production - Service Facturation", names.unclear
    assert isinstance(function, FunctionType)
    before = function.__code__
    assert names.unclear(clear) is None
    try:
        assert give_other_code([function], change, change.applied(source))
        assert names.unclear(clear) is not None
    finally:
        function.__code__ = before


def test_every_known_change_has_a_reason() -> None:
    known = read_known()
    assert all(len(known.reason(name)) > 25 for name in known.names)
    with pytest.raises(ValueError, match="neither"):
        read_known("a.py f: x -> y\n    because\n")


def test_what_is_not_noticed_is_counted_and_what_makes_no_difference_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = changes_of("sieve.py", SOURCE)
    verdicts = {change.name: Verdict(noticed=True, how="failed", by="a test") for change in made}

    def code(known: str, *unnoticed: Change) -> int:
        missed = {change.name: Verdict(noticed=False, how="unnoticed") for change in unnoticed}
        return report(made, verdicts | missed, read_known(known), partial=False)

    assert code("") == 0
    assert code("", made[0]) == 1  # 13 of 14
    assert code(f"{made[0].name}\n    equivalent: nobody can see a difference\n", made[0]) == 0
    assert code(f"{made[0].name}\n    accepted: a difference that no test sees\n", made[0]) == 1
    assert "WHY IS NOT KNOWN" not in capsys.readouterr().out.split("accepted")[-1]
    assert code(f"{made[0].name}\n    equivalent: but a test notices it now\n") == 1  # stale
