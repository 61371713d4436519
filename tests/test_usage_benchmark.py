"""The benchmark of usage still runs; what it measures is not judged here."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("benchmarks.harness", reason="benchmarks/ is not here: this is the built wheel")

from benchmarks import usage
from benchmarks.harness import Result

pytestmark = pytest.mark.slow


def test_the_cost_of_recording_is_measured_for_each_door(tmp_path: Path) -> None:
    result = Result("usage", "")
    usage._cost(result, tmp_path, 0.001)
    names = {figure.name for figure in result.figures}
    for door in ("cached verification", "ASGI middleware", "WSGI middleware"):
        for kept in ("in memory", "in the spool"):
            assert f"{door}: recording {kept} adds" in names
    (lost,) = [figure.value for figure in result.figures if figure.name == "events lost meanwhile"]
    assert lost == 0


@pytest.mark.parametrize("spool", [False, True])
def test_a_steady_load_is_served_and_delivered(tmp_path: Path, spool: bool) -> None:
    found = usage._apart(tmp_path, rate=500, seconds=2.5, spool=spool)
    assert found["served"] > 100
    assert found["lost"] == 0
    assert found["rss"]
