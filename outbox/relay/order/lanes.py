"""What may be sent next: in order within a key, as much at once as the window allows. Pure, no I/O.

```text
 load ──► waiting in the lane of its key ──► ready ──► flying ──► done / held ──► settled ──► forgotten
             (without a key: ready at once)    ▲          │
                                               └── lost ──┘
```

One message of a key is in flight at a time: the broker may refuse it and take the next. Only where a batch arrives whole or
not at all may neighbours of a key fly together, and then nothing more of the key until all of them are answered.

Where the relay's promise of order hangs: a message with a key starts only when this relay delivered the one before it, in this
epoch, or when a query by key, made after the read that brought it, showed that no earlier one waits (`prove`). From where
reads begin and what they leave out decides only when a message goes.

Topics share the window and the room for loaded rows (`budget`): one that is slow, or has much to send, leaves room for the
others. What a read must leave out, because enough of its key or its topic is loaded, is *behind*: it is read on from
where it was passed over as soon as there is room, and until reads have come to their end again.

A row that was answered is remembered until a read that began after the commit of its settling has returned: an earlier
read may still show the row as it was. A key whose message was not delivered stays blocked for as long; then the hold in the
database takes over.
"""

from __future__ import annotations

import heapq
import sys
from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

from outbox.relay.order.behind import Behind
from outbox.relay.order.budget import Budget
from outbox.relay.order.item import Item, Place
from outbox.store.relaying import Ahead
from outbox.tables import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from outbox.relay.order.behind import Selection
    from outbox.store.relaying import Row


@dataclass(slots=True, eq=False)
class _Lane:
    """The loaded rows of one key, lowest sequence first."""

    waiting: list[Item] = field(default_factory=list)
    #: How many of its messages are in flight.
    flying: int = 0
    #: Undelivered messages whose hold is not yet in the database, as far as reads have shown.
    blocks: int = 0
    #: How many of them are not even settled.
    unsettled: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """A read that is under way: what it may show as it was, and what it must leave out."""

    settled: list[int]
    ids: list[int]
    keys: Selection
    topics: Selection


_BY_ORDER = attrgetter("order")
#: How many keys' last delivered sequences are remembered; beyond it a query answers.
_MARKS = 10_000


class Lanes:
    """Everything the relay has in memory between reading a row and being sure that it is gone."""

    def __init__(
        self,
        *,
        window: int,
        window_bytes: int,
        rows_per_key: int,
        rows: int = sys.maxsize,
        rows_bytes: int = sys.maxsize,
        batch_rows: int = 1,
        neighbours: bool = False,
    ) -> None:
        """*rows*, *rows_bytes*: room for what is loaded, which is read on for a topic when *batch_rows* of it fit.

        *neighbours*: of one key several may fly together, because the broker takes a batch whole or not at all.
        """
        self._neighbours = neighbours
        self._window = window
        self._window_bytes = window_bytes
        self._rows_per_key = rows_per_key
        self._batch_rows = batch_rows
        self._loaded, self._loaded_bytes = Budget(rows), Budget(rows_bytes)
        self._flight, self._flight_bytes = Budget(window), Budget(window_bytes)
        self._items: dict[int, Item] = {}
        self._lanes: dict[str, _Lane] = {}
        #: Heaps of ids, by topic.
        self._ready: dict[str, list[int]] = {}
        #: What flies, by token.
        self._flights: dict[int, Item] = {}
        #: Answered, id → the key it blocks or None; first until its settling is committed, then until a read has shown it.
        self._unsettled: dict[int, str | None] = {}
        self._settled: dict[int, str | None] = {}
        #: Delivered messages that held others, until their settling is committed.
        self._releasing: dict[int, str] = {}
        self._delivered: OrderedDict[str, int] = OrderedDict()
        self._unproven: dict[str, None] = {}
        self._behind_keys, self._behind_topics = Behind(self._key_has_room), Behind(self._topic_has_room)

    # --- sizes ---

    @property
    def loaded(self) -> int:
        """Rows in memory that are not answered yet."""
        return len(self._items)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of those rows' messages."""
        return self._loaded_bytes.used

    @property
    def flying(self) -> int:
        """Messages sent and not answered yet."""
        return len(self._flights)

    @property
    def ready(self) -> bool:
        """Whether something could be sent, were there room."""
        return any(self._ready.values())

    @property
    def idle(self) -> bool:
        """Whether nothing is loaded, sent or waiting to be settled."""
        return not self._items and not self._unsettled

    def __contains__(self, id_: int) -> bool:
        return id_ in self._items or id_ in self._unsettled or id_ in self._settled

    def known(self, after: int = 0) -> list[int]:
        """Return the ids above *after* that a read must leave out."""
        return [id_ for place in (self._items, self._unsettled, self._settled) for id_ in place if id_ > after]

    @property
    def crowded(self) -> bool:
        """Whether a topic has all the room it may have, so that what is left is for others."""
        return self._behind_topics.any_full()

    @property
    def behind(self) -> int | None:
        """The lowest id above which rows were passed over that may be loaded now; None if there are none."""
        lowest = (self._behind_keys.lowest(), self._behind_topics.lowest())
        return min((after for after in lowest if after is not None), default=None)

    # --- reading ---

    def read_began(self, after: int = 0) -> Reading:
        """Return what a read above *after* must leave out; call it before the read is sent."""
        return Reading(
            list(self._settled), self.known(after), self._behind_keys.select(after), self._behind_topics.select(after)
        )

    def read_returned(self, reading: Reading) -> None:
        """Forget what was settled before that read began: no later read can show it as it was. Call it before `choose`."""
        for id_ in reading.settled:
            if id_ not in self._settled:
                continue
            key = self._settled.pop(id_)
            if key is not None and (lane := self._lanes.get(key)) is not None:
                lane.blocks -= 1
                self._advance(key, lane)

    def read_ended(self, reading: Reading, end: int | None) -> None:
        """All was looked at up to *end*, or (None) to where reads ahead begin. Call it after `load`."""
        self._behind_keys.ended(reading.keys, end)
        self._behind_topics.ended(reading.topics, end)

    def choose(self, rows: Iterable[Row]) -> list[Row]:
        """Return those of *rows* (in order of their ids) that should be loaded now."""
        chosen: list[Row] = []
        counts: dict[str, int] = {}
        room = self._loaded.copy()
        for row in rows:
            if row.id in self:
                continue
            if not room.allows(row.topic) or not self._loaded_bytes.allows(row.topic):
                self._behind_topics.passed(row.topic, row.id - 1)
                continue
            if row.key is not None:
                lane = self._lanes.get(row.key)
                if lane is not None and lane.blocks:
                    continue
                count = counts.get(row.key, len(lane.waiting) if lane is not None else 0)
                if count >= self._rows_per_key:
                    self._behind_keys.passed(row.key, row.id - 1)
                    continue
                counts[row.key] = count + 1
            room.take(row.topic, 1)
            chosen.append(row)
        return chosen

    def load(self, items: Iterable[Item]) -> None:
        """Take *items* in; those of `choose`, now with their messages."""
        touched: dict[str, _Lane] = {}
        highest: dict[str, int] = {}
        for item in items:
            row = item.row
            if row.id in self:
                continue
            self._items[row.id] = item
            self._loaded.take(row.topic, 1)
            self._loaded_bytes.take(row.topic, item.size)
            highest[row.topic] = row.id
            if row.key is None:
                self._make_ready(item)
                continue
            lane = self._lanes.setdefault(row.key, _Lane())
            if lane.waiting and item.order < lane.waiting[0].order:
                lane.waiting[0].place = Place.WAITING  # it was ready; an earlier one has come
            insort(lane.waiting, item, key=_BY_ORDER)
            touched[row.key] = lane
        for key, lane in touched.items():
            if len(lane.waiting) >= self._rows_per_key:
                self._behind_keys.passed(key, max(item.row.id for item in lane.waiting))
            self._advance(key, lane)
        for topic, id_ in highest.items():
            if not self._loaded.allows(topic) or not self._loaded_bytes.allows(topic):
                self._behind_topics.passed(topic, id_)

    def unproven(self) -> list[int]:
        """Return the ids that could be next of their keys, if no earlier message of the key is still to be delivered."""
        return [self._lanes[key].waiting[0].row.id for key in self._unproven]

    def prove(self, asked: Iterable[int], ahead: Mapping[int, Ahead]) -> bool:
        """Take in the answer of a query made after the last `load`: id → what is before it in its key.

        Rows that must wait, or are gone, are unloaded with their followers; returns True if there were any: a read from the
        start finds them again, in order.
        """
        unloaded = False
        for id_ in asked:
            item = self._items.get(id_)
            if item is None or item.row.key is None or item.place is not Place.WAITING:
                continue
            lane = self._lanes[item.row.key]
            found = ahead.get(id_, Ahead.WAITS)
            if found is Ahead.WAITS:
                self._drop_waiting(lane)
                unloaded = True
            else:
                item.proven, item.passes = True, found is Ahead.PASSABLE
            self._advance(item.row.key, lane)
        return unloaded

    def unload(self, unwanted: Callable[[Row], bool]) -> None:
        """Drop the rows *unwanted* that are not in flight, and what follows them in their lanes."""
        for id_ in [id_ for id_, item in self._items.items() if item.row.key is None and item.place is not Place.FLYING]:
            if unwanted(self._items[id_].row):
                self._drop(self._items[id_])
        for key, lane in list(self._lanes.items()):
            first = next((n for n, item in enumerate(lane.waiting) if unwanted(item.row)), None)
            if first is not None:
                self._drop_waiting(lane, first)
                self._advance(key, lane)

    # --- sending ---

    def take(self, allow: Callable[[Item], bool], limit: int | None = None) -> list[Item]:
        """Return the messages to send now, in order, for which *allow* says yes; they are in flight from here on.

        At most *limit* (the window, if None) are in flight afterwards, and no more bytes than the window has, save for one
        message that alone is larger.
        """
        window = self._window if limit is None else min(limit, self._window)
        taken: list[Item] = []
        back: list[Item] = []
        for item in self._in_turn(window):
            if not self._fits(item):
                back.append(item)
                break
            if not allow(item):
                back.append(item)
                continue
            following: Item | None = item
            while following is not None and self._fits(following) and (following is item or allow(following)):
                self._start(following)
                taken.append(following)
                following = self._neighbour(following) if self._may_fly(item.row.topic, window) else None
        for item in back:
            self._make_ready(item)
        return taken

    def _in_turn(self, window: int) -> Iterator[Item]:
        """Take out what is ready while there is room for more of its topic, lowest id first."""
        heads = [(ids[0], topic) for topic, ids in self._ready.items() if ids]
        heapq.heapify(heads)
        while heads:
            id_, topic = heapq.heappop(heads)
            if not self._may_fly(topic, window):
                continue
            ids = self._ready[topic]
            heapq.heappop(ids)
            item = self._items.get(id_)
            if item is not None and item.place is Place.READY:
                yield item
            if ids:
                heapq.heappush(heads, (ids[0], topic))
            else:
                del self._ready[topic]

    def _may_fly(self, topic: str, window: int) -> bool:
        return self.flying < window and self._flight.allows(topic) and self._flight_bytes.allows(topic)

    def _fits(self, item: Item) -> bool:
        return not self._flights or self._flight_bytes.used + item.size <= self._window_bytes

    def _neighbour(self, item: Item) -> Item | None:
        """Return the message that may fly with *item*, the last one started of its key: the very next, if nothing is wrong."""
        if not self._neighbours or item.row.key is None or not item.plain:
            return None
        waiting = self._lanes[item.row.key].waiting
        if not waiting or not waiting[0].plain or waiting[0].row.sequence != (item.row.sequence or 0) + 1:
            return None
        return waiting[0]

    def ready_ids(self, among: Iterable[int] | None = None) -> set[int]:
        """Return the ids of all that is ready, or of those *among* the given ones."""
        items = self._items
        ready = chain.from_iterable(self._ready.values()) if among is None else among
        return {id_ for id_ in ready if id_ in items and items[id_].place is Place.READY}

    def _start(self, item: Item) -> None:
        item.place = Place.FLYING
        self._flights[item.token] = item
        self._flight.take(item.row.topic, 1)
        self._flight_bytes.take(item.row.topic, item.size)
        if item.row.key is not None:
            lane = self._lanes[item.row.key]
            lane.waiting.remove(item)
            lane.flying += 1

    # --- answers ---

    def flight(self, token: int) -> Item | None:
        """Return the message in flight of that token, if there is one."""
        return self._flights.get(token)

    def flights(self) -> list[Item]:
        """Return what flies, in the order of its start."""
        return list(self._flights.values())

    def done(self, item: Item) -> None:
        """It was delivered: the next of its key may start; its id is remembered until `settled` and a read after it."""
        key = item.row.key
        self._mark(item)
        if key is not None and item.row.state != State.PENDING:
            self._releasing[item.row.id] = key
        if item.row.state == State.UNROUTABLE:
            # Later messages of other topics might overtake what waited behind it, and were loaded because of that. Not now.
            self._block(item)
            return
        self._land(item, None)
        if key is not None:
            self._advance(key, self._lanes[key])

    def _mark(self, item: Item) -> None:
        """Remember how far its key has come; not past what a person may requeue: that would have to go next."""
        key, sequence = item.row.key, item.row.sequence
        if key is None or sequence is None or item.stale or item.passes or self._lanes[key].blocks:
            return
        self._delivered[key] = sequence
        self._delivered.move_to_end(key)
        if len(self._delivered) > _MARKS:
            self._delivered.popitem(last=False)

    def hold(self, item: Item) -> None:
        """It was not delivered: what is loaded of its key is dropped and nothing more is loaded until the hold is seen."""
        self._delivered.pop(item.row.key or "", None)  # a neighbour that flew with it may have arrived before
        self._block(item)

    def _block(self, item: Item) -> None:
        key = item.row.key
        self._land(item, key)
        if key is None:
            return
        lane = self._lanes[key]
        lane.blocks += 1
        lane.unsettled += 1
        self._drop_waiting(lane)
        self._advance(key, lane)

    def again(self, item: Item) -> None:
        """Nobody knows: it is ready again, before everything else of its key."""
        self._end(item)
        if item.row.key is None:
            self._make_ready(item)
            return
        lane = self._lanes[item.row.key]
        lane.flying -= 1
        item.place = Place.WAITING
        item.proven = True
        if lane.blocks:  # its neighbour was not delivered: it comes again when the hold of that is in the database
            self._drop(item)
            self._advance(item.row.key, lane)
            return
        if lane.waiting:
            lane.waiting[0].place = Place.WAITING
        insort(lane.waiting, item, key=_BY_ORDER)
        self._advance(item.row.key, lane)

    def settled(self, ids: Iterable[int]) -> None:
        """The transaction that settled *ids* was committed."""
        for id_ in ids:
            if id_ in self._unsettled:
                blocked = self._settled[id_] = self._unsettled.pop(id_)
                if blocked is not None:
                    self._lanes[blocked].unsettled -= 1
            if (key := self._releasing.pop(id_, None)) is not None:  # reads have passed over what it held
                self._behind_keys.read_on(key, id_)

    def abandon(self) -> None:
        """The shards or the database are others now: keep only what is in flight or answered, believe nothing about keys."""
        self.unload(lambda _row: True)
        for item in self._flights.values():
            item.stale = True
        self._delivered.clear()
        self._behind_keys.clear()
        self._behind_topics.clear()

    def forget(self, item: Item) -> None:
        """Nobody knows, and it is to be read again, by whoever owns the shard."""
        self._end(item)
        self._drop(item)
        if item.row.key is not None:
            lane = self._lanes[item.row.key]
            lane.flying -= 1
            self._drop_waiting(lane)
            self._advance(item.row.key, lane)

    # --- within ---

    def _make_ready(self, item: Item) -> None:
        item.place = Place.READY
        heapq.heappush(self._ready.setdefault(item.row.topic, []), item.row.id)

    def _end(self, item: Item) -> None:
        del self._flights[item.token]
        self._flight.give_back(item.row.topic, 1)
        self._flight_bytes.give_back(item.row.topic, item.size)

    def _land(self, item: Item, blocks: str | None) -> None:
        self._end(item)
        self._drop(item)
        self._unsettled[item.row.id] = blocks
        if item.row.key is not None:
            self._lanes[item.row.key].flying -= 1

    def _drop(self, item: Item) -> None:
        del self._items[item.row.id]
        self._loaded.give_back(item.row.topic, 1)
        self._loaded_bytes.give_back(item.row.topic, item.size)

    def _drop_waiting(self, lane: _Lane, first: int = 0) -> None:
        for item in lane.waiting[first:]:
            item.place = Place.WAITING
            self._drop(item)
        del lane.waiting[first:]

    def _advance(self, key: str, lane: _Lane) -> None:
        """See whether the first of the lane may go, or must be asked about; drop a lane that says nothing any more."""
        self._unproven.pop(key, None)
        if not lane.flying and not lane.blocks and lane.waiting:
            head = lane.waiting[0]
            if head.place is Place.WAITING:
                if self._is_next(head):
                    self._make_ready(head)
                else:
                    self._unproven[key] = None
        if not lane.flying and not lane.blocks and not lane.waiting:
            del self._lanes[key]

    def _is_next(self, item: Item) -> bool:
        sequence, key = item.row.sequence, item.row.key
        if item.proven or key is None or sequence is None:
            return True
        return sequence == 1 or self._delivered.get(key) == sequence - 1

    def _key_has_room(self, key: str) -> bool:
        lane = self._lanes.get(key)
        return lane is None or (not lane.unsettled and len(lane.waiting) <= self._rows_per_key // 2)

    def _topic_has_room(self, topic: str) -> bool:
        return self._loaded.allows_much(topic, self._batch_rows) and self._loaded_bytes.allows(topic)
