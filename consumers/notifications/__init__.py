"""Letters to speakers: accepted, rejected or cancelled. Run it with `outbox consumer run notifications`.

Sending mail is an effect outside the database, so it can't share its transaction: a crash between the mail server's answer
and the commit sends the letter again, under the same Message-ID, which mail programs show once.
"""

from consumers.notifications.service import service

__all__ = ["service"]
