"""The services in the box. Each is a program of its own: its own queue, its own database, no import of another service."""
