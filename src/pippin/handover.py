"""Work for an event loop in another thread, which whoever asked can end at any moment, that of the asking too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def hand_over(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, future: Future[T]) -> None:
    """Begins the work in the loop; what it comes to is the future's, and cancelling that ends it, begun or not.

    ``asyncio.run_coroutine_threadsafe`` makes the future itself: of a Ctrl-C before it has returned, nobody could tell
    the work, which may run by then.
    """

    def begin() -> None:
        if future.cancelled():
            work.close()
            return
        task = loop.create_task(work)

        def leave(asked: Future[T]) -> None:
            if asked.cancelled():
                with contextlib.suppress(RuntimeError):  # the loop is closed: all its tasks have ended
                    loop.call_soon_threadsafe(task.cancel)

        task.add_done_callback(lambda done: tell(done, future))
        future.add_done_callback(leave)

    loop.call_soon_threadsafe(begin)


def tell(done: asyncio.Task[T], future: Future[T]) -> None:
    """The future is what the task has come to, unless it was cancelled."""
    if done.cancelled():
        future.cancel()
    elif not future.set_running_or_notify_cancel():
        done.exception()  # nobody waits for it any more
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())
