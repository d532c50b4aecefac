"""What clients may send: everything wrong is refused in words, by the name of the field."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from pdserve.core.config import Policy
from pdserve.core.errors import RequestError
from pdserve.core.params import SamplingParams
from pdserve.router.api.calls import Call, Chat, parse_chat, parse_completion

USER = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": USER}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> Call:
    return parse_chat(json.dumps(CHAT | fields).encode())


def plain(**fields: Any) -> Call:
    return parse_completion(json.dumps(PLAIN | fields).encode())


def params(call: Call, num_prompt_tokens: int = 10, **limits: int) -> SamplingParams:
    sizes = {"max_context": 100, "vocab_size": 1000} | limits
    return call.params((1,) * num_prompt_tokens, choice=0, seed=7, **sizes)


def refused(call: Any) -> RequestError:
    with pytest.raises(RequestError) as found:
        call()
    assert found.value.status == 400
    return found.value


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{"model": }', "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": -Infinity}', "no JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_no_json_object(parse: Any, data: bytes, text: str) -> None:
    error = refused(lambda: parse(data))
    assert text in str(error) and error.code == "invalid_json" and error.param is None


COMMON_FAULTS: list[tuple[str, Any]] = [
    ("model", 5),
    ("model", ["m"]),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", True),
    ("stream_options", {"include_usage": "yes"}),
    ("n", 0),
    ("n", 9),
    ("n", 1.5),
    ("n", "2"),
    ("n", True),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_tokens", 5.0),
    ("min_tokens", -1),
    ("slo", 5),
    ("slo", {"ttft_ms": 0}),
    ("slo", {"tpot_ms": 5e-324}),
    ("slo", {"tpot_ms": "fast"}),
    ("slo", {"tpot_ms": 1e9}),
    ("priority", 1.5),
    ("priority", 10**9),
    ("stop", 5),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a", 5]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 513),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", list(range(65))),
    ("ignore_eos", "no"),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 1e999),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**31),
    ("min_p", 1.1),
    ("seed", 2**63),
    ("seed", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}),
    ("route", "fastest"),
    ("route", 5),
]


@pytest.mark.parametrize(("field", "value"), COMMON_FAULTS)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    for parse in (chat, plain):
        data = {field: value}
        if value == float("inf"):
            body = json.dumps((CHAT if parse is chat else PLAIN) | {field: 5}).replace("5", "1e999")
            error = refused(
                lambda text=body, one=parse: (parse_chat if one is chat else parse_completion)(
                    text.encode()
                )
            )
        else:
            error = refused(lambda one=parse, fields=data: one(**fields))
        assert error.param == field
        assert field in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("store", True),
        ("best_of", 2),
        ("suffix", "end"),
        ("use_beam_search", True),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_here_is_refused_by_name(field: str, value: Any) -> None:
    for parse in (chat, plain):
        error = refused(lambda one=parse: one(**{field: value}))
        assert (error.param, error.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("functions", []),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("store", False),
        ("best_of", 1),
        ("suffix", ""),
        ("echo", False),
        ("n", 1),
        ("logprobs", False),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("parallel_tool_calls", True),
        ("service_tier", "auto"),
        ("stop", []),
        ("logit_bias", {}),
        *((name, None) for name, _ in COMMON_FAULTS if name != "model"),
        ("tools", None),
        ("audio", None),
        ("logprobs", None),
        ("top_logprobs", None),
    ],
)
def test_what_asks_for_nothing_is_accepted(field: str, value: Any) -> None:
    for parse, bare in ((chat, chat()), (plain, plain())):
        if field == "top_logprobs" and parse is plain:
            continue
        call = parse(**{field: value})
        assert call.ignored == ()
        assert params(call) == params(bare)
        assert (call.num_choices, call.route) == (1, None)


def test_unknown_fields_are_listed() -> None:
    assert chat(foo=1, bar={}, top_logprobs=None).ignored == ("bar", "foo")
    assert plain(messages=USER, top_a=0).ignored == ("messages", "top_a")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([*USER, {"role": "user", "content": ["x"]}], "messages[1].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages[0].tool_calls",
        ),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
    ],
)
def test_wrong_messages(messages: Any, param: str) -> None:
    assert refused(lambda: chat(messages=messages)).param == param


def test_messages_as_a_template_takes_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
        ]
    )
    assert call.prompts == (
        Chat(
            (
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "a\nb"},
                {"role": "assistant", "content": ""},
            )
        ),
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ("hi",)),
        ([1, 2], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    call = plain(prompt=prompt, n=2)
    assert call.prompts == expected
    assert call.num_choices == 2 * len(expected)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        [[1], []],
        5,
        {},
        [1, "a"],
        ["a", [1]],
        [True],
        [1.5],
        "\udfff",
        ["a"] * 65,
    ],
)
def test_wrong_prompts(prompt: Any) -> None:
    assert refused(lambda: plain(prompt=prompt, n=2)).param == "prompt"


@pytest.mark.parametrize("field", ["model", "messages"])
@pytest.mark.parametrize("left_out", [True, False])
def test_missing_fields(field: str, left_out: bool) -> None:
    body = CHAT | {field: None}
    if left_out:
        del body[field]
    error = refused(lambda: parse_chat(json.dumps(body).encode()))
    assert (error.param, error.code) == (field, "missing_required_parameter")


def test_room_for_the_answer() -> None:
    assert params(chat()).max_tokens == 90  # what is left
    assert params(plain()).max_tokens == 16
    assert params(plain(), 95).max_tokens == 5
    assert params(chat(max_tokens=90)).max_tokens == 90
    assert params(chat(max_tokens=5, max_completion_tokens=7)).max_tokens == 7
    for field in ("max_tokens", "max_completion_tokens"):
        error = refused(lambda name=field: params(chat(**{name: 91})))
        assert (error.param, error.code) == (field, "context_length_exceeded")


@pytest.mark.parametrize(("call", "param"), [(chat(), "messages"), (plain(), "prompt")])
def test_a_prompt_that_is_too_long(call: Call, param: str) -> None:
    assert params(call, 99).max_tokens == 1
    error = refused(lambda: params(call, 100))
    assert (error.param, error.code) == (param, "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 6000: 1}}, "logit_bias"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
def test_what_does_not_fit_the_model(fields: dict[str, Any], param: str) -> None:
    call = plain(**fields)
    prompt = call.prompts[0] if isinstance(call.prompts[0], tuple) else (1,)
    error = refused(lambda: call.params(prompt, choice=0, seed=0, max_context=100, vocab_size=1000))
    assert error.param == param


def test_sampling_parameters_arrive() -> None:
    call = plain(
        max_tokens=9,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.1,
        logit_bias={"7": -100},
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=2,
        stop="x",
        route="colocated",
    )
    assert call.params((1, 2), choice=3, seed=11, max_context=50, vocab_size=99) == SamplingParams(
        max_tokens=9,
        temperature=0.0,
        top_k=0,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        seed=11,
        choice=3,
        min_tokens=2,
        stop_token_ids=(3,),
        ignore_eos=True,
        logit_bias=((7, -100.0),),
        logprobs=2,
    )
    assert call.fields.stops == ("x",)
    assert call.route is Policy.COLOCATED


def test_logprobs_of_the_two_interfaces() -> None:
    assert chat().num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).num_logprobs == 5
    assert refused(lambda: chat(top_logprobs=5)).param == "top_logprobs"
    assert refused(lambda: chat(logprobs=True, top_logprobs=21)).param == "top_logprobs"
    assert refused(lambda: chat(logprobs=1)).param == "logprobs"
    assert plain(logprobs=0).num_logprobs == 0
    assert refused(lambda: plain(logprobs=21)).param == "logprobs"
    assert refused(lambda: plain(logprobs=True)).param == "logprobs"


def test_usage_in_a_stream_only() -> None:
    wanted = {"stream_options": {"include_usage": True}}
    assert chat(stream=True, **wanted).include_usage
    assert not chat(**wanted).include_usage
    assert not chat(stream=True, stream_options={"include_obfuscation": False}).include_usage


def test_echo_and_logprobs_are_not_had_together() -> None:
    assert plain(echo=True).echo and not plain().echo and not chat().echo
    error = refused(lambda: plain(echo=True, logprobs=0))
    assert error.param == "echo" and error.code == "unsupported_parameter"
    assert refused(lambda: chat(echo=True)).param == "echo"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1.5] * 200_000},
        {"prompt": [[[1]]] * 200_000},
        {"prompt": [1] * 200_000 + ["x"]},
        {"stop": [1] * 200_000},
        {"logit_bias": {str(index): 1000 for index in range(100_000)}},
    ],
)
def test_a_fault_repeated_is_looked_at_once(fields: dict[str, Any]) -> None:
    data = json.dumps(PLAIN | fields).encode()
    tracemalloc.start()
    try:
        refused(lambda: parse_completion(data))
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()
