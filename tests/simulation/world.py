"""Simulated time and simulated processes: one scheduler, no threads, no sleeping, no I/O.

Code that blocks (the real watcher's loop) and code that awaits (the real authenticator) both run in greenlets,
so that any of them can be held at any clock reading, as a process is by SIGSTOP or a thread by another one.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import inspect
import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

from greenlet import GreenletExit, getcurrent, greenlet

_T = TypeVar("_T")
START = 1_790_000_000.0
"""Wall clock at the beginning, seconds since 1970 UTC."""


class World:
    """Events in the order of their virtual time. Ties go in the order in which they were planned."""

    def __init__(self, rng: random.Random, *, traced: bool = False) -> None:
        self.rng = rng
        self.now = 0.0
        self.hub = getcurrent()
        self.traced = traced
        self.trace: list[str] = []
        self.after_step: Callable[[], None] = lambda: None
        self.processes: list[Process] = []
        self.suspended: set[greenlet] = set()
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()

    def at(self, when: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._count), event))

    def after(self, delay: float, event: Callable[[], object]) -> None:
        self.at(self.now + delay, event)

    def note(self, what: Callable[[], str]) -> None:
        if self.traced:
            self.trace.append(f"{self.now:9.4f}  {what()}")

    def run(self, until: float) -> None:
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, event = heapq.heappop(events)
            event()
            self.after_step()

    def end(self) -> None:
        """Take down what still waits (its stack would never be freed) and what was never begun."""
        self._events.clear()
        for process in self.processes:
            process.dead = True
        while self.suspended:
            self.suspended.pop().throw()
        for task in list(self.tasks):
            coroutine = task.get_coro()
            if (
                inspect.iscoroutine(coroutine)
                and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED
            ):
                coroutine.close()


class Loop(asyncio.AbstractEventLoop):
    """As much of an event loop as futures, tasks, `wait_for` and `to_thread` ask for, in virtual time."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._ready: deque[asyncio.Handle] = deque()
        self._planned = False

    def time(self) -> float:
        return self._process.world.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, **options)
        self._process.world.tasks.add(task)
        return task

    def call_soon(  # type: ignore[override]  # generic over the arguments there
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        self._plan()
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # generic over the arguments there
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # generic over the arguments there
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # generic over the arguments there
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._process.world.at(
            when, lambda: None if timer.cancelled() else self._process.post(lambda: self._due(timer))
        )
        return timer

    def _due(self, timer: asyncio.TimerHandle) -> None:
        self._ready.append(timer)
        self._plan()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        pass  # tasks of a process that crashed

    def run_in_executor(self, executor: object, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:  # type: ignore[override]  # the base class is wider
        done: asyncio.Future[_T] = self.create_future()

        def body() -> None:
            try:
                answer = func(*args)
            except Exception as error:  # noqa: BLE001 - handed to who awaits it
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(answer)

        self._process.spawn(body)
        return done

    def _plan(self) -> None:
        if not self._planned:
            self._planned = True
            self._process.world.after(0.0, lambda: self._process.post(self._start))

    def _start(self) -> None:
        greenlet(self._run).switch()

    def _run(self) -> None:
        asyncio._set_running_loop(self)
        try:
            while self._ready and not self._process.dead:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            self._planned = False
            asyncio._set_running_loop(None)


class Process:
    """One process of the app under test. What reaches it while it stands still waits until it goes on."""

    def __init__(self, world: World, name: str, *, hold: float) -> None:
        self.world = world
        self.name = name
        self.loop = Loop(self)  # type: ignore[abstract]  # what is needed is there
        self.dead = False
        self.held = False
        self.hold_probability = hold
        self.last_reading = 0.0
        """When (true time) a clock was last read: what the guarantee speaks of."""
        self.on_hold: Callable[[float], None] = lambda seconds: None
        self._backlog: deque[Callable[[], None]] = deque()
        world.processes.append(self)

    def post(self, entry: Callable[[], None]) -> None:
        """Let something happen in this process: at once, or when it goes on."""
        if self.dead:
            return
        if self.held:
            self._backlog.append(entry)
        else:
            entry()

    def spawn(self, body: Callable[[], object]) -> None:
        """Run blocking code, as a thread would."""
        self.world.after(0.0, lambda: self.post(lambda: greenlet(body).switch()))

    def block(self, begin: Callable[[Callable[[Any], None]], None]) -> Any:
        """Wait, in blocking code, for what ``begin`` was given to call with an answer."""
        waiting = getcurrent()
        begin(lambda answer: self.post(lambda: waiting.switch(answer)))
        return self._suspend()

    def _suspend(self) -> Any:
        here = getcurrent()
        if self.dead:
            raise GreenletExit
        self.world.suspended.add(here)
        try:
            return self.world.hub.switch()
        finally:
            self.world.suspended.discard(here)

    def sleep(self, seconds: float) -> None:
        self.block(lambda wake: self.world.after(seconds, lambda: wake(None)))

    def hold(self, seconds: float) -> None:
        """Stand still for a while (SIGSTOP, a long collection), while the clocks go on."""
        if not self.held and not self.dead:
            self.held = True
            self.on_hold(seconds)
            self.world.after(seconds, self._go_on)

    def _go_on(self) -> None:
        self.held = False
        while self._backlog and not self.held and not self.dead:
            self._backlog.popleft()()

    def reads_clock(self) -> None:
        """Called at each clock reading, the right moment to be held."""
        self.last_reading = self.world.now
        here = getcurrent()
        if here is not self.world.hub and not self.dead and self.world.rng.random() < self.hold_probability:
            self._held_at_reading(here)

    def _held_at_reading(self, here: greenlet) -> None:
        seconds = self.world.rng.choice((0.1, 0.6, 1.5, 3.0, 5.0))
        self.world.note(lambda: f"{self.name} is held for {seconds} s at a clock reading")
        running = asyncio._get_running_loop() is self.loop
        task = asyncio.current_task(self.loop) if running else None
        if running:
            if task is not None:
                asyncio.tasks._leave_task(self.loop, task)
            asyncio._set_running_loop(None)
        self._backlog.appendleft(lambda: cast("None", here.switch()))
        self.hold(seconds)
        try:
            self._suspend()
        finally:
            if running:
                asyncio._set_running_loop(self.loop)
                if task is not None:
                    asyncio.tasks._enter_task(self.loop, task)


class Lock:
    """Stands in for a `threading.Lock` that is held while its holder waits."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._taken = False
        self._waiting: deque[Callable[[Any], None]] = deque()

    def __enter__(self) -> None:
        while self._taken:
            self._process.block(self._waiting.append)
        self._taken = True

    def __exit__(self, *exc_info: object) -> None:
        self._taken = False
        if self._waiting:
            wake = self._waiting.popleft()
            self._process.world.after(0.0, lambda: wake(None))


class ProcessClock:
    """A process's two clocks. The wall clock may jump; every offset it had is remembered for the oracle."""

    def __init__(self, process: Process, offset: float = 0.0) -> None:
        self.process = process
        self._boot = process.world.now - 1_000.0
        self.offsets = [(process.world.now, offset)]

    def monotonic(self) -> float:
        value = self.uptime(self.process.world.now)
        self.process.reads_clock()
        return value

    def time(self) -> float:
        value = START + self.process.world.now + self.offsets[-1][1]
        self.process.reads_clock()
        return value

    def uptime(self, now: float) -> float:
        """Give what the monotonic clock says at a moment."""
        return now - self._boot

    def jump(self, seconds: float) -> None:
        self.offsets.append((self.process.world.now, self.offsets[-1][1] + seconds))

    def since(self, when: float) -> list[float]:
        """Give every offset the wall clock had since a moment."""
        offsets: list[float] = []
        for began, offset in reversed(self.offsets):
            offsets.append(offset)
            if began <= when:
                break
        return offsets
