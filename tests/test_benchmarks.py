"""The benchmarks still run, and their harness tells the truth. What they measure is not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

harness = pytest.importorskip("benchmarks.harness", reason="benchmarks/ is not here: this is the built wheel")

from benchmarks import cold, flood, floor, guard, middleware, peers, revocation, server, threads, timing  # noqa: E402
from benchmarks.harness import Figure, Result, interleave, load, looped, percentile, show, write  # noqa: E402
from benchmarks.subjects import one_key, place  # noqa: E402

from papaours_auth.digest import PEPPER_VARIABLE  # noqa: E402

TINY = 0.01


def test_a_figure_is_reached_or_missed_at_its_goal() -> None:
    assert Figure("a", 1.0, goal=1.0).verdict == "reached"
    assert Figure("a", 1.01, goal=1.0).verdict == "MISSED"
    assert Figure("a", 15, goal=15, at_most=False).verdict == "reached"
    assert Figure("a", 14.9, goal=15, at_most=False).verdict == "MISSED"
    assert Figure("a", 14.9).verdict == ""


def test_a_missed_goal_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show(Result("a", "A", [Figure("the ratio", 2.0, goal=1.0, note="too slow")], ["redis: not here"]))
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "too slow" in printed
    assert "not measured: redis: not here" in printed


def test_a_result_is_written_with_its_machine_and_read_back(tmp_path: Path) -> None:
    result = Result("a", "A", [Figure("b", 1.5, goal=2, spread=(1.0, 2.0))], ["c"])
    path = write(result, tmp_path)
    machine, read = load(path)
    assert read == result
    assert machine["python"]
    assert "host" not in json.dumps(machine)


def test_interleaved_rounds_see_what_is_slower() -> None:
    found = interleave(
        {"short": looped(sum, range(10)), "long": looped(sum, range(10_000))}, rounds=5, count=20
    )
    assert min(found["long"]) > max(found["short"])


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0], 0.99) == 1.0


def test_the_guard_names_what_is_worse_and_what_is_gone() -> None:
    results = [Result("a", "A", [Figure("x", 2.0), Figure("y", 1.0)])]
    assert guard.regressions(results, {"x": 2.5, "y": 1.5}) == []
    assert guard.regressions(results, {"x": 1.5}) == ["x: 2.00 > 1.5"]
    assert guard.regressions(results, {"z": 1.5}) == ["z: not measured"]
    assert guard.regressions(results, {"z (callgrind)": 1.5}) == []


def test_every_bound_of_the_guard_is_measured() -> None:
    results = [floor.run(TINY, count_instructions=False), middleware.run(TINY)]
    assert not [line for line in guard.regressions(results) if line.endswith("not measured")]


def test_the_floor_verifies_as_well() -> None:
    for made in (floor.floor, floor.copied_floor):
        assert made(b"right")(b"right") is not None
        assert made(b"right")(b"wrong") is None


def test_the_flood_counts_no_store_read_for_a_forged_key() -> None:
    figures = {figure.name: figure for figure in flood.run(0.0002).figures}
    (reads,) = [figure for name, figure in figures.items() if "our format: store reads" in name]
    assert reads.value == 0
    assert figures["foreign: store reads"].value == 100  # the counter counts


def test_cold_verification_runs_on_stores_filled_by_sql() -> None:
    result = cold.run(TINY / 100)
    assert any(figure.goal == cold.GOAL for figure in result.figures)


@pytest.mark.parametrize("modules", [("keyshield", "aiocache", "argon2")])
def test_peers_that_answer_from_memory_run(modules: tuple[str, ...]) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed: it comes with the group bench")
    assert peers.keyshield_loop(cached=True, delays=False)(2) > 0


def test_peers_run_with_fastapi_alone() -> None:
    assert peers.fastapi_loop(hashed=True)(2) > 0


def test_the_timing_benchmark_judges_against_its_controls_and_looks_for_a_deliberate_leak() -> None:
    figures = {figure.name: figure for figure in timing.run(TINY / 100).figures}
    assert figures["cached: unknown against first byte wrong"].goal is not None
    (leak,) = [figure for name, figure in figures.items() if name.startswith("a deliberate ==")]
    assert not leak.at_most


def test_threads_and_stalls_run() -> None:
    assert {figure.unit for figure in threads.run(TINY).figures} == {"ns a call", "x", "ms"}


@pytest.mark.parametrize("cut", [False, True])
def test_a_revocation_is_timed_over_processes(cut: bool) -> None:
    with place("sqlite") as there:
        assert len(revocation.revoked(there, 1, cut=cut)) == 1


def test_a_server_is_loaded_with_and_without_the_middleware() -> None:
    with place("sqlite") as there:
        key = one_key(there.url, there.peppers)[0]
        guard = {"PAPAOURS_STORE": there.url, PEPPER_VARIABLE: there.secret}
        with server.serving(server.CASES[1], guard, key) as served:
            assert server.threads(served.port, key, 2, 0.2).rate > 0


def test_the_words_of_wrk_are_read() -> None:
    said = """
  Latency Distribution
     50%  118.00us
     99%    1.32ms
Requests/sec:   7410.30
"""
    assert server.read_wrk(said) == server.Load(7410.3, 118.0, 1320.0)
    with pytest.raises(RuntimeError, match="well"):
        server.read_wrk(said + "  Non-2xx or 3xx responses: 7")
