"""One timer for many blocks: what `asyncio.timeout` promises of each."""

from __future__ import annotations

import asyncio

import pytest

from papaours_auth._patience import Patience


def test_each_block_ends_at_its_own_time() -> None:
    async def scene() -> None:
        patience, loop = Patience(0.05), asyncio.get_running_loop()

        async def late() -> float:
            begun = loop.time()
            with pytest.raises(TimeoutError), patience.bound():
                await asyncio.sleep(30)
            return loop.time() - begun

        first = asyncio.create_task(late())
        await asyncio.sleep(0.02)  # so that their times differ
        second = asyncio.create_task(late())
        with patience.bound() as quick:
            await asyncio.sleep(0)
        assert min(await first, await second) >= 0.05
        assert not quick.expired
        assert await late() >= 0.05, "after a pause"
        assert not patience.ends

    asyncio.run(scene())


def test_a_block_that_goes_on_all_the_same_is_ended_once() -> None:
    async def scene() -> int:
        patience, cancelled = Patience(0.01), 0
        with patience.bound() as bound:
            for _ in range(3):
                try:
                    await asyncio.sleep(0.03)
                except asyncio.CancelledError:
                    cancelled += 1
        assert bound.expired
        await asyncio.sleep(0)
        return cancelled

    assert asyncio.run(scene()) == 1


def test_who_is_cancelled_by_somebody_else_too_is_told_so() -> None:
    async def scene() -> None:
        patience = Patience(0.01)

        async def block() -> None:
            with patience.bound():
                await asyncio.sleep(30)

        both = asyncio.create_task(block())
        await asyncio.sleep(0)
        patience._look()  # nothing is due
        for bound in list(patience.ends):
            bound.expire()
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        alone = asyncio.create_task(block())
        await asyncio.sleep(0)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        assert not patience.ends

    asyncio.run(scene())


def test_of_blocks_within_each_other_the_one_whose_time_is_over_ends() -> None:
    async def scene() -> None:
        short, long = Patience(0.01), Patience(0.03)
        with pytest.raises(TimeoutError), long.bound() as outer:
            with pytest.raises(TimeoutError), short.bound() as inner:
                await asyncio.sleep(30)
            assert (inner.expired, outer.expired) == (True, False)
            await asyncio.sleep(30)
        with short.bound():
            pass  # the task counts no cancellation any more
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scene())


def test_an_error_of_a_block_is_its_own() -> None:
    async def scene() -> None:
        patience = Patience(0.0)
        with pytest.raises(KeyError), patience.bound():
            raise KeyError
        try:
            with patience.bound():
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    raise OSError from None
        except OSError:
            pass
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scene())
