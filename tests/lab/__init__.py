"""The fault lab: a whole installation under load, one fault after the other for as long as one likes, and a verdict.

`python -m tests.lab --seconds 3600 --seed 42` (or `make lab SECONDS=3600 SEED=42`) starts private servers, two relays, two
processes of a service and writers with a ledger; deals the faults of `faults` from a shuffled deck; heals everything; drains;
and compares ledger, tap and effects. Faults that must disturb nobody else are held against the *canary*: messages of a topic
and keys of their own, timed from their commit to their arrival.
"""
