"""Letters to speakers: accepted, rejected or cancelled. Run it with `outbox consumer run notifications`.

Handing in mail is an effect outside the database, so it can't share the transaction of a message. The handler only writes the
letters it leads to, one row for each recipient, together with the inbox; a background worker hands them in, each on its own: a
mailbox that is full or gone delays nobody else, and no letter is repeated because another failed. A letter is noted as sent as
soon as the mail server has taken it. A crash between the two hands in that one letter again, under the same Message-ID.

| setting | default | |
| --- | --- | --- |
| `NOTIFICATIONS_SMTP_URL` | `smtp://127.0.0.1:1025` | `smtp://host:port`, `smtps://user:password@host:port`; see `mail` |
| `NOTIFICATIONS_FROM` | `Open Event <noreply@openevent.example>` | the sender of all letters |

Both are read and checked when the service starts. Letters that were given up are shown by `python -m consumers.notifications`.
"""

from consumers.notifications.service import service

__all__ = ["service"]
