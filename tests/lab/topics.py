"""The topics of the lab beside those of the writers."""

from __future__ import annotations

#: Each has a queue of its own beside the tap: one can be made silent, the other full.
SILENT, FULL = "trouble.silent", "trouble.full"
#: Nobody hears it until a fault is over.
UNBOUND = "trouble.unbound"
#: Small messages whose time from commit to arrival is measured.
CANARY = "canary"
#: What the tap is bound to from the start.
TAPPED = ("work.*", CANARY, SILENT, FULL)
