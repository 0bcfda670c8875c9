"""Parsing JSON requests and finding methods for `orki submit`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.control.v1.task_pb2 import ServiceSnapshot
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.errors import InvalidArgument, UnknownMethod
from orki_server._cli.submit import find_method, message_json, registered_methods, request_from_json


def test_proto_and_json_field_names_are_accepted() -> None:
    for text in ('{"agent_id": "a", "input_tokens": "7"}', '{"agentId": "a", "inputTokens": 7}'):
        assert request_from_json(text, UsageEvent) == UsageEvent(agent_id="a", input_tokens=7)


def test_the_response_shows_every_field() -> None:
    shown = message_json(UsageEvent(model="m"))
    assert shown["model"] == "m"
    assert shown["output_tokens"] == "0"
    assert len(shown) == len(UsageEvent.DESCRIPTOR.fields)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1, column 1"),
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("7", "must be a JSON object"),
        ('{"modle": "m"}', "modle"),
        ('{"model": 7}', "model"),
        ('{"input_tokens": -1}', "input_tokens"),
        ('{"input_tokens": 1e40}', "input_tokens"),
        ('{"attempt": true}', "attempt"),
        ('{"model": "a", "model": "b"}', "twice"),
        ("[" * 100_000, "nested"),
    ],
)
def test_an_invalid_request_is_described_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        request_from_json(text, UsageEvent)
    assert says in raised.value.message
    assert "\n" not in raised.value.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.sampled_from(["model", "attempt", "x"]), each),
    )
)
def test_any_json_is_accepted_or_refused(value: Any) -> None:
    try:
        request = request_from_json(json.dumps(value), UsageEvent)
    except InvalidArgument:
        request = None
    assert request is None or isinstance(request, UsageEvent)


def methods(work: Any, *services: str) -> Any:
    made = [work(service) for service in services]
    return registered_methods([ServiceSnapshot(service=each.service, image=each.image) for each in made])


def test_methods_are_found_by_a_unique_suffix(work: Any) -> None:
    known = methods(work, "a.v1.OneService", "b.v1.TwoService")
    for name in ("OneService.Do", "OneService/Do", "a.v1.OneService.Do", "v1.OneService/Do"):
        assert find_method(name, known).contract.full_name == "a.v1.OneService/Do"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Do", "is ambiguous"),
        ("OneService.Doo", "did you mean OneService.Do"),
        ("zzz", "registered: "),
        ("", "no "),
    ],
)
def test_an_unknown_method_lists_similar_ones(work: Any, name: str, says: str) -> None:
    with pytest.raises(UnknownMethod, match=says):
        find_method(name, methods(work, "a.v1.OneService", "b.v1.TwoService"))


def test_an_unknown_method_without_services_is_explained() -> None:
    with pytest.raises(UnknownMethod, match="no task service is registered"):
        find_method("Do", [])
