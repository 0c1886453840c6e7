"""Files of each conference that other programs read: iCalendar, xCal, Pentabarf and Open Event JSON.

In 2017 these were the tasks behind the signals: every one read the publisher's database again. This service never does; it
knows only what the messages said. Run it with `outbox consumer run exports`; the files are below `EXPORTS_FOLDER`
(default `instance/exports`), a folder per event.
"""

from consumers.exports.service import service

__all__ = ["service"]
