"""Decoding of request bodies, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.errors import ApiError
from shoal.serve.protocol import ChatRequest, Limits, TokenizeRequest, decode, grammar_of

_json = st.recursive(
    st.none() | st.integers(-9, 9) | st.text('[]{}"\\a', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[]{}"\\a', max_size=4), inner, max_size=3),
    max_leaves=12,
)


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((depth_of(inner) for inner in (value.values() if isinstance(value, dict) else value)), default=0)


@given(value=_json, limit=st.integers(3, 8))
def test_nesting_is_counted_as_json_nests(value: Any, limit: int) -> None:
    body = {"messages": [{"value": value}]}  # three levels around the value
    try:
        decode(json.dumps(body).encode(), TokenizeRequest, Limits(json_depth=limit))
        accepted = True
    except ApiError as error:
        assert error.code == "too_deep" and error.status == 400
        accepted = False
    assert accepted == (depth_of(body) <= limit)


def test_what_openai_clients_send_is_accepted() -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "b"}],
        "user": "u",
        "store": False,
        "metadata": {"k": "v"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "logit_bias": {"5": -100},
    }
    assert decode(json.dumps(body).encode(), ChatRequest, Limits()).logit_bias == {"5": -100}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            ("json_schema", '{"type":"null"}'),
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", '["a","b"]')),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"guided_json": '{"type": "null"}'}, ("json_schema", '{"type": "null"}')),
        ({"guided_grammar": 'root ::= "a"'}, ("ebnf", 'root ::= "a"')),
    ],
)
def test_constraints_by_any_of_their_names(fields: dict[str, Any], expected: tuple[str, str] | None) -> None:
    body = decode(json.dumps({"messages": [], **fields}).encode(), ChatRequest, Limits())
    assert grammar_of(body) == expected
