"""From the engine's thread to event loops: each is woken once for all there is to tell it, however long it sleeps."""

import asyncio
import threading
from collections.abc import Callable, Hashable


class Post:
    """`put` and `send` are for one thread; what was put is called in its loop."""

    def __init__(self) -> None:
        self._new: dict[asyncio.AbstractEventLoop, dict[Hashable, Callable[[], None]]] = {}
        self._on_its_way: dict[asyncio.AbstractEventLoop, dict[Hashable, Callable[[], None]]] = {}
        self._lock = threading.Lock()

    def put(self, loop: asyncio.AbstractEventLoop, key: Hashable, call: Callable[[], None]) -> None:
        """Have `call` called in the loop. Of several with one key that were not called yet one is."""
        self._new.setdefault(loop, {})[key] = call

    def send(self) -> None:
        """Wake the loops for which something was put."""
        for loop, calls in self._new.items():
            with self._lock:
                waiting = self._on_its_way.get(loop)
                if waiting is not None:  # it has not woken yet
                    waiting.update(calls)
                    continue
                self._on_its_way[loop] = calls
            try:
                loop.call_soon_threadsafe(self._deliver, loop)
            except RuntimeError:  # the loop was closed: nobody waits there any more
                with self._lock:
                    del self._on_its_way[loop]
        self._new = {}

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            calls = self._on_its_way.pop(loop)
        for call in calls.values():
            call()
