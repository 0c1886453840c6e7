"""RabbitMQ as the relay's broker: pika's connection in a thread of its own, publishing pipelined, confirmed and mandatory.

A `RabbitBroker` (client.py) makes one `Link` (link.py) after another. A link is one connection, one channel, one tracker
and one I/O loop; they live and end together, so an answer, a timer or a callback of an old connection has nobody left to
reach. Whatever goes wrong on a link ends it, and everything it had in flight is LOST: after a failed write, a silent broker
or an answer nobody asked for, no later answer could be trusted to belong to the message it seems to.
"""

from __future__ import annotations

from outbox.relay.rabbitmq.broker import RabbitBroker

__all__ = ["RabbitBroker"]
