"""Who listens to what: channels, their subscribers, and what the server is to be told.

A *route* is a channel that somebody wants, or whose LISTEN is still on:

=========  ==============================  =========================================
state      meaning                         next
=========  ==============================  =========================================
idle       the server knows nothing of it  asked (wanted), gone (not wanted)
asked      LISTEN or UNLISTEN under way    listening, idle; gone (LISTEN rejected)
listening  LISTEN confirmed                asked (unwanted for ``linger`` seconds)
any        the session is lost             idle (wanted), gone (not wanted)
=========  ==============================  =========================================

Tasks only say what they want, synchronously, and wait; one task per session does
the asking (`keep_listening`), one request after the other. So LISTEN and UNLISTEN
of one channel can't overtake each other, and a cancelled subscriber has nothing
to take back but its wish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, final

import anyio

from pgstructured.errors import ListenRejectedError

from ._channels import quote_name
from ._events import Origin, make_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import psycopg

    from ._channels import Channel
    from ._events import RawNotification
    from ._subscription import Subscription

_channel_of = itemgetter(0)


@final
class Route:
    """One channel; see the module's text."""

    __slots__ = ("error", "idle_since", "name", "quoted", "ready", "state", "users", "views")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.quoted: str = quote_name(name)
        self.state: Literal["idle", "asked", "listening"] = "idle"
        self.users: int = 0
        self.idle_since: float = -math.inf
        self.views: dict[Callable[[str], Any] | None, dict[Subscription[Any], None]] = {}
        """Subscribers by how they want payloads decoded: each notification is one object, and
        decoded once, for all of a view."""
        self.ready: anyio.Event | None = None
        self.error: psycopg.Error | None = None
        """Why the server refused to listen."""

    def rejection(self) -> ListenRejectedError:
        """Return what a subscriber is told when the server refuses this channel."""
        error = ListenRejectedError(
            f"the server refused to listen to {self.name!r}: {self.error}",
            channel=self.name,
            sqlstate=None if self.error is None else self.error.sqlstate,
        )
        error.__cause__ = self.error
        return error

    def wake(self) -> None:
        """Wake the subscribers that wait for this route."""
        if self.ready is not None:
            self.ready.set()
            self.ready = None

    async def wait(self) -> None:
        """Wait for something to happen to this route."""
        if self.ready is None:
            self.ready = anyio.Event()
        await self.ready.wait()


@final
@dataclass(slots=True)
class Plan:
    """What the server is to be told next."""

    listen: list[Route] = field(default_factory=list[Route])
    unlisten: list[Route] = field(default_factory=list[Route])
    due: float = math.inf
    """Event-loop time at which there will be more, without anything changing."""
    changed: anyio.Event = field(default_factory=anyio.Event)
    """Set as soon as there may be more."""


@final
class Routes:
    """All routes of one bus."""

    def __init__(self, static: Iterable[str], *, linger: float) -> None:
        self._static = frozenset(static)
        self._linger = linger
        self._routes: dict[bytes, Route] = {}
        self._touched: dict[Route, None] = {}
        self._changed = anyio.Event()
        self.subscriptions: dict[Subscription[Any], None] = {}
        """Every subscription, in the order they came."""
        self.renew()

    @property
    def names(self) -> frozenset[str]:
        """Names of the channels."""
        return frozenset(route.name for route in self._routes.values())

    def is_static(self, route: Route) -> bool:
        """Tell whether the bus itself wants this channel."""
        return route.name in self._static

    # ------------------------------------------------------------ subscribers

    def hold(
        self, subscription: Subscription[Any], channels: Iterable[Channel[Any]]
    ) -> list[Route]:
        """Register a subscriber with its channels."""
        self.subscriptions[subscription] = None
        held: list[Route] = []
        for channel in channels:
            route = self._find(channel.name)
            route.users += 1
            route.views.setdefault(channel.decode, {})[subscription] = None
            self._touch(route)
            held.append(route)
        return held

    def release(self, subscription: Subscription[Any], held: Iterable[Route], now: float) -> None:
        """Forget a subscriber, and channels that nobody wants any more after a while."""
        del self.subscriptions[subscription]
        for route in held:
            for decode, subscribers in list(route.views.items()):
                subscribers.pop(subscription, None)
                if not subscribers:
                    del route.views[decode]
            route.users -= 1
            route.idle_since = now
            if not self._is_wanted(route) and route.error is None:
                if route.state == "idle":
                    self._forget(route)
                else:
                    self._touch(route)

    def dispatch(
        self, batch: Sequence[RawNotification], generation: int, received_at: float
    ) -> None:
        """Hand the notifications of one read to their subscribers, in order."""
        runs: Iterable[tuple[bytes, Iterable[RawNotification]]]
        runs = groupby(batch, _channel_of) if len(batch) > 1 else ((batch[0][0], batch),)
        for name, run_of in runs:
            route = self._routes.get(name)
            if route is None:
                continue
            # Of copies: what a `where` or an instrument does is its own affair.
            raws = list(run_of)
            for decode, subscribers in tuple(route.views.items()):
                run = make_run(raws, Origin(route.name, decode, generation, received_at))
                for subscription in tuple(subscribers):
                    subscription._offer(run)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    # ------------------------------------------------------------ the server

    def plan(self, now: float) -> Plan:
        """Return what to ask the server for, and take it as asked."""
        if self._changed.is_set():
            self._changed = anyio.Event()
        plan = Plan(changed=self._changed)
        for route in list(self._touched):
            if self._is_wanted(route):
                if route.state == "idle":
                    route.state = "asked"
                    plan.listen.append(route)
            elif route.state == "idle":
                self._forget(route)
            elif (due := route.idle_since + self._linger) <= now:
                route.state = "asked"
                plan.unlisten.append(route)
            else:
                plan.due = min(plan.due, due)
                continue  # stays touched
            self._touched.pop(route, None)
        return plan

    def confirm_listen(self, routes: Iterable[Route]) -> None:
        """Take note that the server listens."""
        for route in routes:
            route.state = "listening"
            route.wake()
            self._touch(route)  # it may be unwanted by now

    def confirm_unlisten(self, routes: Iterable[Route]) -> None:
        """Take note that the server listens no more."""
        for route in routes:
            route.state = "idle"
            self._touch(route)  # it may be wanted again by now

    def reject(self, route: Route, error: psycopg.Error) -> None:
        """Take note that the server refuses a channel: its present subscribers are to be told.

        Whoever comes later tries anew.
        """
        route.error = error
        self._forget(route)
        route.wake()
        for subscribers in route.views.values():
            for subscription in subscribers:
                subscription._end_once(route.rejection())  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    def renew(self) -> None:
        """Take note that the session is gone: the server knows nothing any more."""
        for route in list(self._routes.values()):
            route.state = "idle"
            if not self._is_wanted(route):
                self._forget(route)
        for name in sorted(self._static):
            self._find(name)
        self._touched = dict.fromkeys(self._routes.values())

    def wake_all(self) -> None:
        """Wake every subscriber that waits for a route."""
        for route in self._routes.values():
            route.wake()

    def _is_wanted(self, route: Route) -> bool:
        return route.users > 0 or route.name in self._static

    def _find(self, name: str) -> Route:
        return self._routes.setdefault(name.encode(), Route(name))

    def _forget(self, route: Route) -> None:
        self._routes.pop(route.name.encode(), None)
        self._touched.pop(route, None)

    def _touch(self, route: Route) -> None:
        self._touched[route] = None
        self._changed.set()
