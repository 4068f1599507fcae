"""Notifications: a bus that never goes deaf, and publishing."""

from pgstructured._util import publish

from ._backlog import Overflow as Overflow
from ._bus import NotifyBus as NotifyBus
from ._channels import Channel as Channel
from ._events import Gap as Gap, GapReason as GapReason, Notification as Notification
from ._open import (
    NotifyBusOptions as NotifyBusOptions,
    open_notify_bus as open_notify_bus,
    run_notify_bus as run_notify_bus,
)
from ._options import InitialConnect as InitialConnect
from ._publish import notify as notify, notify_many as notify_many
from ._publisher import (
    Publisher as Publisher,
    PublisherStatistics as PublisherStatistics,
    open_publisher as open_publisher,
)
from ._state import BusState as BusState, BusStatistics as BusStatistics
from ._subscription import (
    GapHandling as GapHandling,
    Subscription as Subscription,
    SubscriptionStatistics as SubscriptionStatistics,
)

__all__ = (
    "BusState",
    "BusStatistics",
    "Channel",
    "Gap",
    "GapHandling",
    "GapReason",
    "InitialConnect",
    "Notification",
    "NotifyBus",
    "NotifyBusOptions",
    "Overflow",
    "Publisher",
    "PublisherStatistics",
    "Subscription",
    "SubscriptionStatistics",
    "notify",
    "notify_many",
    "open_notify_bus",
    "open_publisher",
    "run_notify_bus",
)

publish(__name__, globals())
