"""The signals of the publisher: four of 2017 and the move of a session's state. No handlers here, and none anywhere near.

Each is sent as `signal.send(current_app._get_current_object(), event_id=…, …)` before the commit; docs/messages.md says
with what.
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

event_json_modified = _signals.signal("event_json_modified", doc="An event or one of its tracks changed.")
sessions_modified = _signals.signal("sessions_modified", doc="A session, its state or its speakers changed.")
session_state_changed = _signals.signal("session_state_changed", doc="An existing session moved to another state.")
speakers_modified = _signals.signal("speakers_modified", doc="A speaker changed.")
microlocations_modified = _signals.signal("microlocations_modified", doc="A room changed.")
