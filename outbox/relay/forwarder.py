"""One turn of the relay: collect answers, settle them, read, send. The broker's thread publishes while this one reads.

No transaction is open while the broker works. What was answered is kept here until a transaction that settled it has
committed, however long the database is away; a message known to be confirmed is never sent again by this process, unless
the database went back in time: then the relay forgets all it knew, and starts from what is there.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from outbox import database
from outbox.message import Message
from outbox.process import failpoints
from outbox.process.logs import say
from outbox.relay import telemetry, verdict
from outbox.relay.broker import Answer, Cause, Outcome, Outgoing
from outbox.relay.broker_log import TopicNews
from outbox.relay.order.answers import Answers
from outbox.relay.order.departures import Departures
from outbox.relay.order.item import Item
from outbox.relay.order.lanes import Lanes
from outbox.relay.order.read_position import Position
from outbox.relay.order.suspects import Caution
from outbox.relay.order.topic_probes import Topics
from outbox.store import relaying, settling
from outbox.store.witness import Witness
from outbox.tables import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Engine

    from outbox.relay.broker import Broker
    from outbox.relay.shards import Shards
    from outbox.relay.verdict import Policy
    from outbox.store.relaying import Row
    from outbox.store.witness import World

log = logging.getLogger(__name__)

#: What a message takes in memory and on the wire besides its body, about.
_ENVELOPE_BYTES = 600
#: Bytes in flight, bytes of one read, and bytes loaded that topics share.
_WINDOW_BYTES, _READ_BYTES, _LOADED_BYTES = 32 << 20, 8 << 20, 64 << 20
#: How long a row that was held when it was read may wait to be sent: commands may discard such rows.
_HELD_SECONDS = 1.0
#: Rows of one key in memory: one hot key must not fill it.
_ROWS_PER_KEY = 100
#: While messages flow, and for this long after a wake-up that brought nothing, reads come this close together.
_WOKEN_READ_SECONDS, _FLOWING_READ_SECONDS = 0.0015, 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how often."""

    batch_rows: int = 500
    window: int = 2000
    poll_seconds: float = 0.5
    #: How long a wake-up keeps the relay reading: twice what writers wait between two notifications.
    woken_seconds: float = 0.02


class Forwarder:
    """Moves messages from the tables to the broker."""

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        shards: Shards,
        policy: Policy,
        limits: Limits,
        *,
        relay_id: str,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._reading = database.reading(engine)
        self._broker = broker
        self._shards = shards
        self._policy = policy
        self._limits = limits
        self._relay_id = relay_id
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311
        # Two batches beside the window: while one is read, the other keeps the window of a topic full that is alone.
        self._capacity = limits.window + 2 * limits.batch_rows
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet."""
        limits, broker = self._limits, self._broker
        rows_per_key = max(1, min(_ROWS_PER_KEY, (limits.window + limits.batch_rows) // 10))
        self.lanes = Lanes(
            window=limits.window,
            window_bytes=_WINDOW_BYTES,
            rows_per_key=rows_per_key,
            rows=self._capacity,
            rows_bytes=_LOADED_BYTES,
            batch_rows=limits.batch_rows,
            neighbours=broker.whole_batches,
        )
        self._position = Position()
        self._caution = Caution()
        self._topics = Topics(unheard_seconds=self._policy.unheard_seconds)
        self.answers = Answers(enough=limits.batch_rows)
        #: Which database answered last, and the last receipt written there: by them it is known again.
        self._server = ""
        self._receipt: int | None = None
        self._topic_news = TopicNews()
        self._departures = Departures(self.lanes, self._caution, self._topics, self._clock)
        #: What flies although it was given up, by token: it may be answered after all.
        self._given_up: dict[int, Item] = {}
        #: How often a row was nacked, for its backoff. What the row itself counts are failures of its own.
        self._nacks: Counter[int] = Counter()
        self._own_answers: list[Answer] = []
        self._held_read_at: float | None = None
        self._read_at = 0.0
        self._woken_until = 0.0
        self._flowing_until = 0.0
        #: Whether reads from the start to the end found nothing that is not in memory.
        self.exhausted = False
        #: Whether all pages of the present round of reads from the start were empty, and nothing was settled meanwhile.
        self._quiet = False
        #: Whether the last read ended before the rows did.
        self.reads_on = False

    # --- answers ---

    def collect(self, timeout: float) -> int:
        """Wait at most *timeout* seconds for answers, and decide what they mean; return how many came."""
        answers = self._broker.answers(0.0 if self._own_answers else timeout)
        if self._own_answers:
            answers = [*self._own_answers, *answers]
            self._own_answers = []
        if answers:
            self._take_in(answers)
        return len(answers)

    def _take_in(self, answers: Sequence[Answer]) -> None:
        now, wall = self._clock(), datetime.now(UTC)
        were_flying = self._departures.flying
        lost: list[tuple[Item, Answer]] = []
        published: Counter[str] = Counter()
        for answer in answers:
            item = self.lanes.flight(answer.token)
            if item is None:
                self._departures.probing.discard(answer.token)
                self._take_late(answer, now, wall)
                continue
            if answer.outcome in (Outcome.LOST, Outcome.NOT_SENT):
                lost.append((item, answer))
                continue
            if answer.outcome is Outcome.SILENT:
                self._given_up[answer.token] = item
            elif answer.token not in self._departures.probing:
                self._caution.passed(item.row.id)
                self._take_hint(item.row.topic, now)
            self._departures.probing.discard(answer.token)
            if answer.outcome is Outcome.CONFIRMED:
                failpoints.reached("R3")
                published[item.row.topic] += 1
                telemetry.CONFIRM.observe(answer.seconds)
            self._apply(item, answer, now, wall)
        for topic, count in published.items():
            telemetry.PUBLISHED.labels(topic).inc(count)
        if lost:
            self._take_losses(lost, were_flying, now, wall)
        if self._departures.flying == 0:
            self._departures.suspects_fly = False
        elif published:
            failpoints.reached("R4")

    def _apply(self, item: Item, answer: Answer, now: float, wall: datetime) -> None:
        row = item.row
        if answer.outcome is not Outcome.CONFIRMED:
            telemetry.FAILURES.labels(telemetry.reason(answer)).inc()
        decided = verdict.of(row, answer, self._policy, self._rng, self._nacks[row.id])
        if isinstance(decided, verdict.Done) and item.outgoing is not None:
            message = item.outgoing.message
            age = max(0.0, (wall - message.created_at).total_seconds())
            telemetry.DELIVERY.observe(age)
            self.answers.add(settling.Confirmed(row.id, row.message_row, message.id, age, answer.seconds), now)
            self.lanes.done(item)
            if self._given_up:
                self._given_up = {token: other for token, other in self._given_up.items() if other.row.id != row.id}
            self._nacks.pop(row.id, None)
        elif isinstance(decided, verdict.Hold):
            self._nacks[row.id] += answer.outcome is Outcome.NACKED
            self.answers.add(_change(item, decided), now)
            self.lanes.hold(item)
            if decided.state is State.DEAD:
                self._caution.given_up(row.id)
        self._tell_topic(row, answer.outcome, now)

    def _tell_topic(self, row: Row, outcome: Outcome, now: float) -> None:
        """Take in what an answer says of its topic."""
        if self._topics.answered(row, outcome, now):
            self.lanes.unload(self._topics.stopped)
            self._position.want_full()
            self._topic_news.tell(self._topics.troubles(), now)

    def _take_late(self, answer: Answer, now: float, wall: datetime) -> None:
        """Take in what became of a message that was given up: a confirm is a fact, whatever its row was said to be."""
        item = self._given_up.pop(answer.token, None)
        if item is None or item.outgoing is None or answer.outcome is not Outcome.CONFIRMED:
            return
        row, message = item.row, item.outgoing.message
        age = max(0.0, (wall - message.created_at).total_seconds())
        if all(flying.row.id != row.id for flying in self.lanes.flights()):  # else it flies again, and that answer will do
            self.answers.add(settling.Confirmed(row.id, row.message_row, message.id, age, answer.seconds), now)
        self.lanes.unload(lambda other: other.id == row.id)
        self._tell_topic(row, answer.outcome, now)

    def _take_hint(self, answered: str, now: float) -> None:
        """Another topic is *answered* on a new connection: it was the first unanswered one that kept the last one silent.

        A channel that is new to a quorum queue without a majority waits for it, for a minute, with all that came later.
        """
        item, self._departures.first_unanswered = self._departures.first_unanswered, None
        if item is None or item.row.topic == answered:
            return
        notice = Answer(item.token, Outcome.SILENT, cause=Cause.SILENCE)
        decided = verdict.of(item.row, notice, self._policy, self._rng)
        if isinstance(decided, verdict.Hold) and self._shards.epochs.get(item.row.shard, 0) == item.epoch:
            self.answers.add(_change(item, decided), now)
        self._tell_topic(item.row, Outcome.SILENT, now)

    def _take_losses(self, lost: list[tuple[Item, Answer]], were_flying: int, now: float, wall: datetime) -> None:
        probes = [each for each in lost if each[1].token in self._departures.probing]
        lost = [each for each in lost if each[1].token not in self._departures.probing]
        for item, answer in probes:
            self._take_lost_probe(item, answer, now, wall)
        if not lost:
            return
        sent = [(item.row.id, answer.cause) for item, answer in lost if answer.outcome is Outcome.LOST]
        closed = [id_ for id_, cause in sent if cause.may_be_a_message]
        blamed = any(cause is Cause.MESSAGE for _, cause in sent)
        self._caution.dropped(id_ for id_, _ in sent)
        first = lost[0]
        if first[1].outcome is Outcome.LOST and first[1].cause is Cause.SILENCE:
            self._departures.first_unanswered = first[0]
        culprits = self._caution.lost(closed, were_flying=were_flying, blamed=blamed)
        for item, answer in lost:
            telemetry.FAILURES.labels(telemetry.reason(answer)).inc()
            if item.stale or self._shards.epochs.get(item.row.shard, 0) != item.epoch:
                self.lanes.forget(item)
            elif item.row.id in culprits:
                detail = f"the connection is lost whenever it is sent: {answer.detail}"
                self._apply(item, Answer(answer.token, Outcome.REFUSED, detail), now, wall)
            elif _is_held(item.row):
                self.lanes.forget(item)  # and read again: a person may have discarded it
                self._position.want_full()
            else:
                self.lanes.again(item)

    def _take_lost_probe(self, item: Item, answer: Answer, now: float, wall: datetime) -> None:
        """A probe got no answer: its topic goes on waiting, and whatever ended the connection, others were not in it."""
        self._departures.probing.discard(answer.token)
        if item.stale or self._shards.epochs.get(item.row.shard, 0) != item.epoch:
            self.lanes.forget(item)
        elif answer.cause is Cause.SILENCE and answer.outcome is Outcome.LOST:
            self._apply(item, replace(answer, outcome=Outcome.SILENT), now, wall)
        else:
            telemetry.FAILURES.labels(telemetry.reason(answer)).inc()
            self._topics.lost(item.row, now, sent=answer.outcome is Outcome.LOST)
            self.lanes.again(item)
            self.lanes.unload(self._topics.stopped)

    # --- settling ---

    def settle(self, *, even_locked: bool = False) -> None:
        """Record the answers at hand in one transaction; on an error of the database they stay at hand.

        So do those whose rows somebody has locked, for a while; *even_locked*: these are tried at once.
        """
        now = self._clock()
        confirmed, changes = self.answers.due(math.inf if even_locked else now)
        if not confirmed and not changes:
            return
        with self._engine.begin() as connection:
            settled = settling.settle(connection, self._relay_id, confirmed, changes, receipt_id=self._receipt)
        failpoints.reached("R6")
        self._receipt = settled.receipt or self._receipt
        tried = {each.id for each in confirmed} | {each.id for each in changes}
        self.lanes.settled(self.answers.settled(tried, settled.locked, now))
        self.exhausted = self._quiet = False
        if settled.strangers:
            self._start_anew(f"{len(settled.strangers)} of its rows are of other messages than before")
        elif self._knows(settled.world) and settled.gone:
            self.abandon()  # for whatever reason: there is something that we don't know

    def _knows(self, world: World) -> bool:
        """Say whether *world* is the database that what we know of keys is about; if it is not, know nothing any more.

        Rows are deleted and changed by their message ids, whatever is believed here. But a database that went back numbers
        messages of a key anew: what was delivered there before says nothing about them.
        """
        if not world.remembers:
            self._start_anew(f"it does not have receipt {self._receipt} of this relay")
            return False
        known, self._server = self._server, world.server
        if known in ("", world.server):
            return True
        self.abandon()
        self._caution = self._departures.caution = Caution()
        return False

    def _start_anew(self, sign: str) -> None:
        say(
            log,
            logging.WARNING,
            "database.went_back",
            f"the database went back in time (restored, or a standby that lacked the last commits): {sign}; the relay forgets "
            "what it knew and starts from what is there: messages may arrive twice",
        )
        self._begin()
        self._shards.look_now()

    # --- reading ---

    def wake(self) -> None:
        """A writer says there is something: read now, and closely for a while."""
        now = self._clock()
        self._read_at = now
        self._woken_until = now + self._limits.woken_seconds

    @property
    def read_due_at(self) -> float | None:
        """When the next read should begin; None while there is no room for more."""
        if not self._room():
            return None
        return 0.0 if self.lanes.behind is not None else min(self._read_at, self._position.full_wanted_at)

    def _room(self) -> int:
        """Return how many rows may be read: no sliver of a batch, so that a busy relay reads whole ones.

        What one topic leaves is for the others, and be it a sliver.
        """
        limits, lanes = self._limits, self.lanes
        room = self._capacity - lanes.loaded
        if lanes.loaded_bytes > _LOADED_BYTES + _READ_BYTES or room < (1 if lanes.crowded else max(1, limits.batch_rows // 4)):
            return 0
        return min(room, limits.batch_rows)

    def read(self) -> int:
        """Load what may be sent next; return how many rows were loaded."""
        room, now = self._room(), self._clock()
        if not room:
            return 0
        span = self._position.next(now, self.lanes.behind)
        reading = self.lanes.read_began(span.after)
        closed, unheard = self._topics.closed(now, self.lanes.__contains__)
        exclude = relaying.Exclusions(reading.ids, reading.keys.left_out, reading.topics.left_out, closed, unheard)
        with self._reading.connect() as connection:
            began = self._clock()
            rows, end = relaying.read(connection, after=span.after, upto=span.upto, limit=room, exclude=exclude)
            ended = self._clock()
            if end is not None and span.upto is None and len(rows) < room and not self._position.scouting:
                self._position.scout_from(relaying.newest(connection) - relaying.SCANNED)  # most of it must wait
            self.lanes.read_returned(reading)
            chosen = self.lanes.choose(rows)
            if self._topics.troubled:
                chosen = [row for row in chosen if self._topics.admit(row, now)]
            known_by = Witness(self._relay_id, self._receipt)
            message_rows = [row.message_row for row in chosen]
            content = relaying.messages(connection, message_rows, max_bytes=_READ_BYTES, known_by=known_by)
            if chosen and not self._knows(content.world or known_by.ask(connection)):
                return 0
            loaded = [self._item(row, content) for row in chosen if row.message_row not in content.postponed]
            self.lanes.load(loaded)
            if self._held_read_at is None and any(_is_held(item.row) for item in loaded):
                self._held_read_at = ended
        if content.postponed:
            end = min(row.id for row in chosen if row.message_row in content.postponed) - 1
        left = self._position.returned(span, rows[-1].id if rows else None, end, began=began, ended=ended)
        if not span.scouts:
            self.lanes.read_ended(reading, left)
        self._quiet = (self._quiet or span.begins) and not rows
        self.exhausted = self._quiet and span.sweeps_all and left is None and self.lanes.idle
        self.reads_on = end is not None or self._position.scouting
        self._plan_next_read(now, len(rows))
        failpoints.reached("R1")
        return len(loaded)

    def prove(self) -> None:
        """Ask, for keys whose previous message this relay did not deliver itself, whether an earlier one is still there."""
        asked = self.lanes.unproven()
        if not asked:
            return
        with self._reading.connect() as connection:
            waits = relaying.predecessors(connection, asked)
        if self.lanes.prove(asked, waits):
            self._position.want_full()

    def _item(self, row: Row, content: relaying.Content) -> Item:
        message = content.found.get(row.message_row)
        item = Item(row, None, _ENVELOPE_BYTES, self._shards.epochs.get(row.shard, 0), content.ids.get(row.message_row))
        if isinstance(message, Message):
            item.outgoing = Outgoing(item.token, message, self._shards.lease.may_write)
            item.size += len(message.body)
        else:
            item.problem = str(message) if message is not None else f"its row {row.message_row} of outbox_message is gone"
        return item

    def _plan_next_read(self, began: float, found: int) -> None:
        now = self._clock()
        if found:
            self._flowing_until = now + 1.0
            if now < self._woken_until:
                self._woken_until = now + self._limits.woken_seconds
        if self.reads_on:
            self._read_at = now
        elif now < self._woken_until:
            self._read_at = now + max(_WOKEN_READ_SECONDS, now - began)
        elif now < self._flowing_until:
            self._read_at = now + min(_FLOWING_READ_SECONDS, self._limits.poll_seconds)
        else:
            self._read_at = now + self._limits.poll_seconds

    def abandon(self) -> None:
        """Another relay has the shards: drop what has not been sent."""
        self.lanes.abandon()
        self._caution.forget(self.lanes.known())
        self._position = Position()

    # --- sending ---

    def send(self) -> int:
        """Hand the broker what may go now; return how many messages. Nothing without a lease, or a broker that takes it."""
        if not self.lanes.ready:
            return 0
        state = self._broker.state()
        if not state.connected or state.blocked or not self._shards.valid():
            return 0
        self._doubt_what_was_held()
        taken = self._take()
        batch: list[Outgoing] = []
        for item in taken:
            if item.outgoing is None:
                self._own_answers.append(Answer(item.token, Outcome.REFUSED, item.problem))
            elif self._topics.apart(item.row):
                self._departures.probing.add(item.outgoing.token)
                self._broker.probe(item.outgoing)
            else:
                batch.append(item.outgoing)
        if batch:
            self._broker.send(batch)
        return len(taken)

    def _take(self) -> list[Item]:
        return self._departures.take()

    def _doubt_what_was_held(self) -> None:
        """Unload rows that a person may have discarded since they were read: what is still to be sent is read again."""
        if self._held_read_at is not None and self._clock() - self._held_read_at > _HELD_SECONDS:
            self._held_read_at = None
            self.lanes.unload(_is_held)
            self._position.want_full()


def _is_held(row: Row) -> bool:
    return row.state != State.PENDING


def _change(item: Item, decided: verdict.Hold) -> settling.Change:
    row = item.row
    return settling.Change(
        id=row.id,
        message_id=item.message_id,
        shard=row.shard,
        epoch=item.epoch,
        was=(row.state, row.attempts),
        state=decided.state,
        attempts=decided.attempts,
        wait_seconds=decided.wait_seconds,
        error=decided.error,
    )
