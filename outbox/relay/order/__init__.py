"""What may be sent next, and from where to read: the pure part of the relay, without I/O and without a clock of its own."""
