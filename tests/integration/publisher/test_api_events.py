from __future__ import annotations

import pytest

from outbox import Message
from tests.integration.publisher.conftest import EVENT, Api, data_of


def test_an_event_is_made_shown_changed_and_deleted(api: Api) -> None:
    made, headers = api.post("/v1/events", EVENT)
    path = headers["Location"]

    assert path == f"/v1/events/{made['id']}"
    assert (made["starts_at"], made["state"], made["external_id"]) == ("2027-05-23T07:00:00Z", "draft", None)
    assert api.get(path) == made

    changed = api.change(path, name="Blinker Days", description="<p>Two of them</p>")
    assert changed == made | {"name": "Blinker Days", "description": "<p>Two of them</p>"}
    assert api.get(path) == changed

    api.delete(path)
    assert api.refused("GET", path)["status"] == 404


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"name": "Other"}, "updated"),
        ({"state": "published"}, "published"),
        ({"state": "published", "name": "Other"}, "published"),
    ],
)
def test_a_change_of_an_event_is_told_by_its_name(api: Api, sent: list[Message], values: dict[str, str], change: str) -> None:
    path = f"/v1/events/{api.event()['id']}"

    api.change(path, **values)

    assert [data_of(message)["change"] for message in sent] == ["created", change]
    assert data_of(sent[-1])["event"] == api.get(path)


def test_an_event_taken_back_is_unpublished(api: Api, sent: list[Message]) -> None:
    path = f"/v1/events/{api.event(state='published')['id']}"

    api.change(path, state="draft")

    assert data_of(sent[-1])["change"] == "unpublished"


def test_an_event_can_not_end_before_it_starts(api: Api, sent: list[Message]) -> None:
    event = api.event()
    sent.clear()

    problem = api.refused("PATCH", f"/v1/events/{event['id']}", {"ends_at": "2027-05-23T06:59:59Z"})

    assert problem["errors"] == [{"pointer": "/ends_at", "detail": "must not be before starts_at"}]
    assert sent == []
    assert api.get(f"/v1/events/{event['id']}") == event


def test_an_event_goes_with_all_that_belongs_to_it_and_one_message_says_so(api: Api, sent: list[Message]) -> None:
    doomed, other = api.event()["id"], api.event()["id"]
    for event in (doomed, other):
        track = api.make(f"/v1/events/{event}/tracks", name="Web")["id"]
        room = api.make(f"/v1/events/{event}/microlocations", name="Hall")["id"]
        speaker = api.make(f"/v1/events/{event}/speakers", name="Ada")["id"]
        session = api.make(f"/v1/events/{event}/sessions", title="One", track_id=track, microlocation_id=room)["id"]
        api.put(f"/v1/sessions/{session}/speakers/{speaker}")
    kept = {kind: api.all(f"/v1/events/{other}/{kind}") for kind in ("tracks", "microlocations", "speakers", "sessions")}
    before = api.get(f"/v1/events/{doomed}")
    tracks = api.all(f"/v1/events/{doomed}/tracks")
    sent.clear()

    api.delete(f"/v1/events/{doomed}")

    (message,) = sent
    assert data_of(message) == {"event_id": doomed, "change": "deleted", "event": before, "tracks": tracks}
    assert kept == {kind: api.all(f"/v1/events/{other}/{kind}") for kind in kept}
    for path in ("sessions", "speakers", "tracks", "microlocations"):
        assert api.refused("GET", f"/v1/events/{doomed}/{path}")["detail"] == f"there is no event {doomed}"


def test_the_id_of_a_deleted_event_is_not_given_again(api: Api) -> None:
    first = api.event()["id"]
    api.delete(f"/v1/events/{first}")

    assert api.event()["id"] > first


def test_a_list_is_read_page_by_page_without_gaps_while_it_grows(api: Api) -> None:
    ids = [api.event(name=f"Event {number}")["id"] for number in range(5)]

    first = api.get("/v1/events?limit=2")
    assert [event["id"] for event in first["items"]] == ids[:2]
    assert api.request("GET", "/v1/events?limit=2").headers["Link"] == f'<{first["next"]}>; rel="next"'
    api.delete(f"/v1/events/{ids[1]}")
    ids.append(api.event(name="late")["id"])
    second = api.get(first["next"])
    third = api.get(second["next"])

    assert [event["id"] for page in (second, third) for event in page["items"]] == ids[2:]
    assert third["next"] is None
    assert "Link" not in api.request("GET", second["next"]).headers


def test_the_longest_page_is_a_full_one(api: Api) -> None:
    for number in range(3):
        api.event(name=f"Event {number}")

    page = api.get("/v1/events?limit=3")

    assert (len(page["items"]), page["next"]) == (3, None)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", "limit=0 must be a number from 1 to 200"),
        ("limit=201", "limit=201 must be"),
        ("limit=x", "limit=x must be"),
        ("cursor=17", "cursor is none of this API's"),
        ("cursor=after-99999999999999999999", "cursor is none of this API's"),
        ("page=2", "unknown parameter 'page': there are limit, cursor"),
        ("limit=1&limit=2", "parameter 'limit' is given twice"),
    ],
)
def test_a_parameter_that_is_none_is_refused(sqlite_api: Api, query: str, said: str) -> None:
    problem = sqlite_api.refused("GET", f"/v1/events?{query}")

    assert problem["status"] == 400
    assert problem["detail"].startswith(said)
