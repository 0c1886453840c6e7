"""Which queues a topic reaches: the rules of an AMQP topic exchange. Pure."""

from __future__ import annotations


def matches(pattern: str, topic: str) -> bool:
    """Say whether *pattern* takes *topic*: words between dots, `*` is any one word, `#` any number of words, also none."""
    parts = pattern.split(".") if pattern else []
    # The places in the pattern that the words so far can have led to. No recursion: `#.#.#.#` must not cost a search.
    places = _past_hashes(parts, {0})
    for word in topic.split(".") if topic else ():
        reached = {place for place in places if place < len(parts) and parts[place] == "#"}
        reached |= {place + 1 for place in places if place < len(parts) and parts[place] in ("*", word)}
        places = _past_hashes(parts, reached)
    return len(parts) in places


def _past_hashes(parts: list[str], places: set[int]) -> set[int]:
    """Add the places that are reached without a word: those after a `#`."""
    found = set(places)
    for place in places:
        following = place
        while following < len(parts) and parts[following] == "#":
            following += 1
            found.add(following)
    return found
