"""Requests to several servers that hold the same weights: spread over them, and asked again where one is lost.

This module knows nothing of vLLM. One thread decides everything; threads of a pool only wait for servers.
"""

import contextlib
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from minirl_edu.rollout.base import EngineError

ATTEMPTS = 6
"""Tries in a row without any progress, while a server is there; with the waits between them about 6 s."""


class Lost(Exception):
    """The connection broke, or the server said 5xx: worth another try, there or at another server."""


class Member:
    """A server of a `Fleet`.

    up          it has the current weights, as far as is known
    waiting     why a thread waits for it to start, if one does
    asked       its requests in flight
    fruitless   how often it was lost since its last answer
    losses      how often it was lost
    sockets     its open connections
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.up = False
        self.waiting = ""
        self.asked = self.fruitless = self.losses = 0
        self.sockets: set[socket.socket] = set()

    def ensure(self, stop: threading.Event) -> None:
        """Wait until the server is there and has the current weights; give up with Lost at `stop`.

        Raises ConnectionError, TimeoutError or EngineError where that does not succeed.
        """
        raise NotImplementedError

    def cut(self) -> None:
        """End its requests in flight, at the server too, by closing their connections."""
        for connected in list(self.sockets):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


class Fleet:
    """The servers at which `ask` and `everywhere` do something; at most `concurrency` requests at once over all.

    With one server, its errors are the fleet's. With several, one that fails is named in a warning, once each time, and
    left out; the next `ask` tries it again. An error is raised only if no server is left.
    """

    def __init__(self, members: Sequence[Any], *, concurrency: int) -> None:
        self.members, self.concurrency = members, concurrency

    def everywhere(self, act: Callable[[Any, threading.Event], None], *, whole: bool = False) -> None:
        """`act(member, stop)` at all members that are up, side by side; at all others too if none is up, or `whole`.

        `whole` raises what any of them raises. Otherwise nobody waits for a member that is gone, unless all are.
        """
        members = self.members if whole else [m for m in self.members if m.up] or self.members
        gone: dict[Member, str] = {}
        with self._threads(len(members)) as (pool, stop):
            running = {pool.submit(act, member, stop): member for member in members}
            for member in members:
                member.up = False
            while running and (whole or not gone):
                finished, _ = wait(running, timeout=0.05, return_when=FIRST_COMPLETED)
                for future in finished:
                    member = running.pop(future)
                    self._settle(member, future, alone=whole or not (running or self._any_up))
                if self._any_up and all(member.waiting for member in running.values()):
                    gone = {member: member.waiting for member in running.values()}
        for member, trouble in gone.items():
            self._warn(member, trouble)

    def ask(
        self, count: int, send: Callable[[Any, int], Any], on_answer: Callable[[int, Any], object]
    ) -> dict[int, Any]:
        """`send(member, i)` for every i below `count`; returns what came back, and tells `on_answer` of each at once.

        Each goes to the member with the fewest requests in flight. One that raises Lost is sent again when the member
        is back, or to another; one that raises TimeoutError to another, once. Other errors are raised.
        """
        waiting, answers = list(range(count)), {}
        slow: dict[int, dict[Member, TimeoutError]] = {}
        with self._threads(self.concurrency + len(self.members)) as (pool, stop):
            running: dict[Future[Any], tuple[Member, int | None, int]] = {}

            def try_again(member: Member) -> None:
                running[pool.submit(_bring_back, member, stop)] = (member, None, 0)

            for member in self.members:
                member.asked = member.fruitless = 0
                if not member.up:
                    try_again(member)
            while len(answers) < count:
                for i, member in self._places(waiting, slow):
                    waiting.remove(i)
                    member.asked += 1
                    running[pool.submit(send, member, i)] = (member, i, member.losses)
                if not running:  # what is left took too long at every server that is there
                    raise next(iter(slow[waiting[0]].values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    member, i, losses = running.pop(future)
                    coming = any(request is None for _, request, _ in running.values())
                    if i is None:
                        self._settle(member, future, alone=not (coming or self._any_up))
                        continue
                    member.asked -= 1
                    try:
                        answers[i] = future.result()
                    except (Lost, TimeoutError) as error:
                        if isinstance(error, TimeoutError):
                            slow.setdefault(i, {})[member] = error
                            if len(slow[i]) == min(2, len(self.members)):
                                raise
                        waiting.insert(0, i)
                        # Of all the requests that a loss takes away, the first tells.
                        if losses == member.losses and self.lose(member, str(error), coming=coming):
                            try_again(member)
                    else:
                        member.fruitless = 0
                        on_answer(i, answers[i])
        return answers

    def lose(self, member: Member, trouble: str, *, coming: bool = False) -> bool:
        """Send nothing to this member until it has come back; returns whether that is to be tried again.

        `coming`: another is being brought back. Raises EngineError for the last one that is there but answers nothing.
        """
        if member.up:
            self._warn(member, trouble)
        member.up = False
        member.losses += 1
        member.fruitless += 1
        if member.fruitless < ATTEMPTS:
            return True
        if not (coming or self._any_up):
            raise EngineError(
                f"{member.url}: no answer to any request in {ATTEMPTS} attempts: {trouble}; see what it prints, or "
                "start it anew with scale/serve.py"
            ) from None
        return False

    @property
    def _any_up(self) -> bool:
        return any(member.up for member in self.members)

    def _places(self, waiting: Sequence[int], slow: dict[int, dict[Member, TimeoutError]]) -> Iterator[tuple[int, Any]]:
        """Which requests can be sent now, and to whom."""
        free = self.concurrency - sum(member.asked for member in self.members)
        for i in list(waiting):
            able = [m for m in self.members if m.up and m not in slow.get(i, ())]
            if not free or not self._any_up:
                return
            if able:
                free -= 1
                yield i, min(able, key=lambda member: member.asked)

    def _settle(self, member: Member, future: "Future[Any]", *, alone: bool) -> None:
        """The member is up if what was tried with it succeeded; raises why not if it is `alone`."""
        try:
            future.result()
        except (Lost, OSError, EngineError) as error:
            if alone:
                raise
            self._warn(member, str(error))
        else:
            member.up = True

    def _warn(self, member: Member, trouble: str) -> None:
        if len(self.members) > 1:
            warnings.warn(
                f"the server at {member.url} is lost ({trouble}). The others do its work, and it is tried again: start "
                "it anew with scale/serve.py, or take it out of rollout.options.url",
                RuntimeWarning,
                stacklevel=3,
            )

    @contextmanager
    def _threads(self, count: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
        """A pool, and what ends the waiting in it; what is left in it at the end is cut off."""
        pool, stop, ended = ThreadPoolExecutor(count, thread_name_prefix="rollout"), threading.Event(), False
        try:
            yield pool, stop
            ended = True
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for member in self.members:
                member.cut()
            pool.shutdown(wait=ended)  # after an error, or Ctrl-C, nobody waits


def pause(attempt: int) -> float:
    """Seconds before the next attempt: 0.1, 0.2, 0.4 … at most 5."""
    return min(0.1 * 2**attempt, 5.0)


def _bring_back(member: Member, stop: threading.Event) -> None:
    if member.fruitless:
        stop.wait(pause(member.fruitless - 1))
    member.ensure(stop)
