"""Capture: a signal becomes rows in the transaction of the web process that sent it."""
