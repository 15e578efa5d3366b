"""Requests of many clients computed together.

Nothing waits for company: while one batch is computed, the next requests gather, and all that are there then make the
next batch. So a lone client waits for nobody, and many clients share the cost of a call.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class BusyError(Exception):
    """More requests wait than there is room for."""


class Batcher(Generic[In, Out]):
    """Computes items in batches, in an executor; for one event loop.

    Args:
      compute: items to as many results; what it raises is raised by all that wait for them.
      executor: where it runs.
      most: items of a batch.
      room: items that may wait.

    Attributes:
      batches: computed so far.
      items: computed so far.
    """

    def __init__(
        self, compute: Callable[[list[In]], Sequence[Out]], executor: Executor, *, most: int = 32, room: int = 256
    ) -> None:
        self._compute, self._executor, self._most = compute, executor, most
        self._waiting: asyncio.Queue[tuple[In, asyncio.Future[Out]]] = asyncio.Queue(room)
        self.batches = self.items = 0

    async def __call__(self, item: In) -> Out:
        """Returns the result of an item.

        Raises:
          BusyError: too many wait.
        """
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((item, future))
        except asyncio.QueueFull:
            raise BusyError from None
        return await future

    async def run(self) -> None:
        """Computes until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(item, future) for item, future in batch if not future.cancelled()]  # its client may have left
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._executor, self._compute, [item for item, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self.batches, self.items = self.batches + 1, self.items + len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
