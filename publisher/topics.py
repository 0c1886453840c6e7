"""Which signal travels under which topic. Everything about a conference shares its key: services hear it in commit order."""

from __future__ import annotations

from outbox import Outbox
from publisher import signals

outbox = Outbox()

KEY = "event:{event_id}"
TOPICS = {
    "event.modified": signals.event_json_modified,
    "session.modified": signals.sessions_modified,
    "session.state_changed": signals.session_state_changed,
    "speaker.modified": signals.speakers_modified,
    "microlocation.modified": signals.microlocations_modified,
}

for _topic, _signal in TOPICS.items():
    outbox.capture(_signal, topic=_topic, key=KEY)
