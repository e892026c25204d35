"""An engine in a thread of its own, for callers that wait: servers and rollouts. It is a TokenPolicy.

Everything that touches the engine (adding, aborting, replacing weights) is a command that its thread carries out between two
steps. Tokens go back to the caller's event loop as they are sampled.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rorqual.engine.engine import Engine
from rorqual.engine.request import Constraint, Request
from rorqual.engine.sampler import Sampled
from rorqual.errors import UserError
from rorqual.policy import Completion, SamplingParams


class Busy(UserError):
    """The queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: int):
        self.retry_after_s = retry_after_s
        super().__init__(f"the engine has {waiting} requests waiting; try again in {retry_after_s} s")


class Closing(UserError):
    """The engine is shutting down and takes no more requests."""


_END = object()


@dataclass(eq=False)
class Handle:
    """One request from the caller's side: iterate over its tokens as they come, then take the completion."""

    service: EngineService
    loop: asyncio.AbstractEventLoop
    streams: bool = True
    """False: nobody iterates over its tokens, so that only its end is handed over."""
    request: Request | None = None
    _tokens: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    _sent: int = 0
    _completion: Completion | None = None

    async def __aiter__(self) -> AsyncIterator[Sampled]:
        while (item := await self._tokens.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def completion(self) -> Completion:
        """Wait for the end (tokens not yet iterated over are skipped) and give the whole completion."""
        if self._completion is None:
            async for _ in self:
                pass
        assert self._completion is not None
        return self._completion

    def abort(self) -> None:
        """Withdraw the request; its blocks are free after the step under way. Safe to call at any time, more than once."""
        self.service.command(lambda engine: self.request and engine.abort(self.request))

    def _news(self, engine: Engine) -> Callable[[], None] | None:
        """In the engine's thread: what hands over what is new, to be called in the caller's loop; None where nothing is."""
        request = self.request
        assert request is not None
        if not request.is_finished and (not self.streams or self._sent == len(request.sampled)):
            return None
        fresh, self._sent = request.sampled[self._sent :] if self.streams else [], len(request.sampled)
        return functools.partial(self._put, fresh, engine.completion(request) if request.is_finished else None)

    def _put(self, fresh: list[Sampled], completion: Completion | None) -> None:
        for item in fresh:
            self._tokens.put_nowait(item)
        if completion is not None:
            self._completion = completion
            self._tokens.put_nowait(_END)

    def _fail(self, error: BaseException) -> None:
        _in_loop(self.loop, [functools.partial(self._tokens.put_nowait, error)])


def _in_loop(loop: asyncio.AbstractEventLoop, calls: list[Callable[[], None]]) -> None:
    """Have a loop make some calls, waking it once."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: [call() for call in calls])


class EngineService:
    """`async with EngineService(engine) as policy: await policy.complete(tokens, params)`."""

    def __init__(self, engine: Engine, max_waiting: int = 256):
        self.engine, self.max_waiting = engine, max_waiting
        self._commands: deque[Callable[[Engine], Any]] = deque()
        self._handles: dict[Request, Handle] = {}
        self._wake = threading.Condition()
        self._accepting, self._running = True, True
        self._pending = 0  # added by callers, not yet seen by the thread
        self._thread = threading.Thread(target=self._work, name="rorqual-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> EngineService:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # --- asked by callers

    async def complete(
        self, prompt_tokens: Sequence[int], params: SamplingParams, constraint: Constraint | None = None
    ) -> Completion:
        """One completion; a caller that is cancelled withdraws its request."""
        handle = self.submit(prompt_tokens, params, constraint, streams=False)
        try:
            return await handle.completion()
        except asyncio.CancelledError:
            handle.abort()
            raise

    def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
        *,
        streams: bool = True,
    ) -> Handle:
        """Queue a request from a coroutine. Raises Busy where the queue is full, Closing after close.

        A request that is wrong (an id beyond the vocabulary, say) raises its UserError when the handle is iterated over.
        """
        if not self._accepting:
            raise Closing("the engine is shutting down and takes no more requests")
        waiting = self.num_waiting
        if waiting >= self.max_waiting:
            raise Busy(waiting, retry_after_s=1 + waiting // 32)
        handle = Handle(self, asyncio.get_running_loop(), streams)
        self._pending += 1
        self.command(lambda engine: self._add(engine, handle, prompt_tokens, params, constraint))
        return handle

    async def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int | None = None, mixing: bool = False
    ) -> int:
        """Engine.update_weights between two steps; returns the new version."""
        return await asyncio.wrap_future(self.command(lambda engine: engine.update_weights(weights, version, mixing)))

    def command(self, call: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread call something between two steps."""
        future: Future[Any] = Future()

        def run(engine: Engine) -> None:
            try:
                future.set_result(call(engine))
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            self._commands.append(run)
            self._wake.notify()
        return future

    @property
    def is_accepting(self) -> bool:
        """Whether new requests are taken: not any more once `close` was called."""
        return self._accepting

    @property
    def num_waiting(self) -> int:
        """Requests that are not being computed yet."""
        return len(self.engine.scheduler.waiting) + self._pending

    async def close(self, drain: bool = True) -> None:
        """Take no more requests; with drain finish those there are, else abort them; then end the thread."""
        self._accepting = False
        if not drain:
            self.command(self._abort_all)
        self.command(lambda engine: setattr(self, "_running", False))
        await asyncio.to_thread(self._thread.join)

    # --- in the engine's thread

    def _work(self) -> None:
        engine = self.engine
        while self._running or not engine.scheduler.is_idle:
            with self._wake:
                while not self._commands and engine.scheduler.is_idle and self._running:
                    self._wake.wait()
            self._carry_out()
            try:
                touched = [] if engine.scheduler.is_idle else engine.step()
            except Exception as error:
                self._fail_all(error)
                continue
            self._settle(touched)

    def _carry_out(self) -> None:
        if not self._commands:
            return
        while self._commands:
            self._commands.popleft()(self.engine)
        # A command may have computed steps or ended requests itself (replaced weights, aborted).
        self._settle(list(self._handles))

    def _add(
        self, engine: Engine, handle: Handle, prompt: Sequence[int], params: SamplingParams, constraint: Constraint | None
    ) -> None:
        self._pending -= 1
        try:
            handle.request = engine.add(prompt, params, constraint)
        except UserError as error:
            handle._fail(error)
            return
        self._handles[handle.request] = handle

    def _settle(self, touched: Iterable[Request]) -> None:
        """Hand over what is new of some requests, waking each caller's loop once."""
        calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for request in touched:
            handle = self._handles.get(request)
            news = handle and handle._news(self.engine)
            if handle and news:
                calls.setdefault(handle.loop, []).append(news)
                if request.is_finished:
                    del self._handles[request]
        for loop, of_loop in calls.items():
            _in_loop(loop, of_loop)

    def _abort_all(self, engine: Engine) -> None:
        for request in list(self._handles):
            engine.abort(request)

    def _fail_all(self, error: Exception) -> None:
        """A step that failed (out of memory on the device, say) ends the requests in it; the engine goes on."""
        for request, handle in list(self._handles.items()):
            if request in self.engine.scheduler.running:
                self.engine.abort(request)
                handle._fail(error)
                del self._handles[request]
