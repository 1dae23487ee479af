"""An endpoint that answers 429, 500, garbage, hangs and cuts off: nothing is lost, and nothing is asked for twice."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distill.answers import AnswerJournal, Reply, Request
from distill.endpoint import EndpointError, Tally, ask_all, make_request, parse_reply, retry_after_s
from distill.traces_config import EndpointSource
from rollout.errors import UserError
from tests.distill.endpoint_server import Answer, Server, completion, running

SLOW = {"hangs": 2.0}


def config_of(server: Server | str, **fields: Any) -> EndpointSource:
    values = {
        "kind": "endpoint",
        "base_url": server if isinstance(server, str) else server.url,
        "model": "teacher",
        "data": {"source": "generator", "generator": "arithmetic"},
        "num_concurrent": 2,
        "timeout_s": 5.0,
        "backoff_s": 0.02,
        "max_backoff_s": 0.05,
        "max_tries": 4,
    }
    return EndpointSource.model_validate(values | fields)


def requests_of(config: EndpointSource, count: int) -> list[Request]:
    return [make_request(config, f"q/{n}", [{"role": "user", "content": f"{n}?"}], 0, n) for n in range(count)]


def ask(config: EndpointSource, folder: Path, count: int, stop: threading.Event | None = None) -> Tally:
    journal = AnswerJournal(folder / "answers.jsonl")
    stop = stop or threading.Event()
    return ask_all(config, requests_of(config, count), journal, seed=0, stop=stop, progress=lambda _: None)


def answers(config: EndpointSource, folder: Path, count: int) -> list[str]:
    journal = AnswerJournal(folder / "answers.jsonl")
    return [journal.read(request.key).content for request in requests_of(config, count) if request.key in journal]


def echo(body: dict[str, Any], number: int) -> dict[str, Any]:
    return completion(f"to {body['messages'][-1]['content']}")


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D1_TEST_KEY", "secret")
    with running(echo) as server:
        config = config_of(
            server,
            api_key_variable="D1_TEST_KEY",
            system_prompt="Think.",
            max_tokens_field="max_completion_tokens",
            max_completion_tokens=99,
            extra_body={"top_k": 5},
        )
        ask(config, tmp_path, 1)
        (body,) = server.bodies
        assert server.headers[0]["Authorization"] == "Bearer secret"
    assert body == {
        "model": "teacher",
        "messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": "0?"}],
        "temperature": 0.6,
        "top_p": 0.95,
        "max_completion_tokens": 99,
        "seed": 0,
        "top_k": 5,
    }
    reply = AnswerJournal(tmp_path / "answers.jsonl").read(requests_of(config, 1)[0].key)
    assert reply == Reply(
        content="to 0?", reasoning=None, finish_reason="stop", num_tokens=7, model="teacher-v2", reply_id="r-1"
    )


TROUBLES = [
    Answer(b"slow down", 429),
    Answer(b"oops", 500),
    Answer(b"<html>not json", 200),
    Answer(b"\xff\xfe\x00", 200),
    Answer({"choices": []}, 200),
    Answer({"error": {"message": "overloaded"}}, 200),
    Answer(completion(""), 200),
    Answer(completion("half"), 200, cut_off=True),
    Answer(b"not gzip", 200, {"Content-Encoding": "gzip"}),
    Answer(completion("late"), 200, **SLOW),
    Answer(b"", 503),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=range(len(TROUBLES)))
def test_a_try_that_fails_is_followed_by_another(tmp_path: Path, trouble: Answer) -> None:
    seen: Counter[str] = Counter()

    def script(body: dict[str, Any], number: int) -> Answer | dict[str, Any]:
        question = body["messages"][-1]["content"]
        seen[question] += 1
        return trouble if question == "1?" and seen[question] <= 2 else echo(body, number)

    with running(script) as server:
        config = config_of(server, timeout_s=0.4)
        tally = ask(config, tmp_path, 3)
        assert answers(config, tmp_path, 3) == ["to 0?", "to 1?", "to 2?"]
    assert seen == {"0?": 1, "1?": 3, "2?": 1}
    assert (tally.num_answered, tally.num_tries, tally.failures) == (3, 5, ())
    assert tally.num_unread == (2 if trouble.status == 200 else 0)


def test_a_request_is_given_up_after_its_tries_and_the_rest_goes_on(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer | dict[str, Any]:
        return Answer(b"no", 500) if body["messages"][-1]["content"] == "1?" else echo(body, number)

    with running(script) as server:
        config = config_of(server)
        tally = ask(config, tmp_path, 3)
        (failure,) = tally.failures
        assert failure.question_id == "q/1"
        assert "4 tries in" in failure.reason
        assert "status 500: no" in failure.reason
        assert tally.num_answered + len(tally.failures) == 3
        again = ask(config, tmp_path, 3)
        assert (again.num_kept, again.num_tries) == (2, 4)  # only the one that was not answered is asked again


def test_a_request_that_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    with running(lambda body, number: Answer(b"too long", 400)) as server:
        tally = ask(config_of(server), tmp_path, 2)
        assert [failure.reason for failure in tally.failures] == ["status 400: too long"] * 2
        assert len(server.bodies) == 2


@pytest.mark.parametrize("timeout_s", [0.3, 30.0])
def test_a_hanging_endpoint_ends_at_the_deadline(tmp_path: Path, timeout_s: float) -> None:
    with running(lambda body, number: Answer(completion("late"), **SLOW)) as server:
        began = time.monotonic()
        tally = ask(config_of(server, timeout_s=timeout_s, deadline_s=0.7, max_tries=50), tmp_path, 1)
        assert time.monotonic() - began < 1.8  # the server hangs for 2
    (failure,) = tally.failures
    assert "no whole reply" in failure.reason
    assert tally.num_unread == tally.num_tries


def test_retry_after_holds_every_request_back(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer | dict[str, Any]:
        return Answer(b"", 429, {"Retry-After": "1"}) if number == 0 else echo(body, number)

    with running(script) as server:
        tally = ask(config_of(server, num_concurrent=1), tmp_path, 2)
        assert server.times[1] - server.times[0] >= 1.0
    assert tally.num_answered == 2


def test_retry_after_beyond_the_deadline_gives_up_at_once(tmp_path: Path) -> None:
    with running(lambda body, number: Answer(b"", 429, {"Retry-After": "600"})) as server:
        began = time.monotonic()
        tally = ask(config_of(server, deadline_s=30.0), tmp_path, 1)
        assert time.monotonic() - began < 10
    assert len(tally.failures) == 1


def test_retry_after_in_its_forms() -> None:
    assert retry_after_s("12", 0) == 12
    assert retry_after_s(None, 0) == 0
    assert retry_after_s("Thu, 01 Jan 1970 00:01:40 GMT", 40.0) == 60
    assert retry_after_s("Thu, 01 Jan 1970 00:01:40 GMT", 200.0) == 0
    assert retry_after_s("soon", 0) == 0


def test_pace_and_concurrency_have_limits(tmp_path: Path) -> None:
    with running(lambda body, number: Answer(echo(body, number), hangs=0.1)) as server:
        ask(config_of(server, num_concurrent=3), tmp_path / "a", 9)
        assert server.most_at_once == 3
        server.times.clear()
        ask(config_of(server, num_concurrent=3, requests_per_minute=600), tmp_path / "b", 6)
        assert server.times[-1] - server.times[0] >= 0.45  # five gaps of 0.1 s, less the way to the server


# --- stopping, and going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refused_key_ends_it_and_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("D1_TEST_KEY", "secret")
    with running(lambda body, number: echo(body, number) if number < 2 else Answer(b"key secret?", status)) as server:
        config = config_of(server, api_key_variable="D1_TEST_KEY", num_concurrent=1)
        with pytest.raises(EndpointError, match="2 answers so far are kept") as caught:
            ask(config, tmp_path, 9)
        assert len(server.bodies) == 3
    assert "secret" not in str(caught.value)
    assert f"status {status}" in str(caught.value)


def test_a_missing_key_is_said_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D1_TEST_KEY", raising=False)
    with pytest.raises(UserError, match="D1_TEST_KEY"):
        ask(config_of("http://127.0.0.1:9/v1", api_key_variable="D1_TEST_KEY"), tmp_path, 1)


def test_an_endpoint_that_is_gone_stops_the_run_and_a_later_one_goes_on(tmp_path: Path) -> None:
    with running(lambda body, number: echo(body, number) if number < 3 else Answer(b"", 503)) as server:
        config = config_of(server, num_concurrent=1, max_tries=2, max_failures_in_row=2)
        with pytest.raises(EndpointError, match=r"2 requests in a row were given up.*3 answers so far"):
            ask(config, tmp_path, 8)
        server.script = echo
        asked = len(server.bodies)
        tally = ask(config, tmp_path, 8)
        assert (tally.num_kept, tally.num_answered) == (3, 5)
        assert len(server.bodies) - asked == 5
        assert answers(config, tmp_path, 8) == [f"to {n}?" for n in range(8)]


def test_failures_with_answers_between_them_do_not_stop_the_run(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Answer | dict[str, Any]:
        return Answer(b"no", 400) if number % 2 else echo(body, number)

    with running(script) as server:
        tally = ask(config_of(server, num_concurrent=1, max_failures_in_row=2), tmp_path, 8)
    assert (tally.num_answered, len(tally.failures)) == (4, 4)


def test_stopping_keeps_what_is_under_way(tmp_path: Path) -> None:
    stop = threading.Event()

    def script(body: dict[str, Any], number: int) -> Answer:
        if number == 3:
            stop.set()
        return Answer(echo(body, number), hangs=0.1)

    with running(script) as server:
        tally = ask(config_of(server), tmp_path, 20, stop)
        assert tally.num_answered == len(server.bodies) < 8


def test_after_a_kill_no_finished_request_is_sent_again(tmp_path: Path) -> None:
    with running(lambda body, number: Answer(echo(body, number), hangs=0.02)) as server:
        config = config_of(server, num_concurrent=1)
        child = os.fork()
        if child == 0:
            journal = AnswerJournal(tmp_path / "answers.jsonl")

            def die(tally: Tally) -> None:
                if tally.num_answered == 4:
                    os.kill(os.getpid(), signal.SIGKILL)

            ask_all(config, requests_of(config, 9), journal, seed=0, stop=threading.Event(), progress=die)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        with (tmp_path / "answers.jsonl").open("ab") as file:
            file.write(b'{"key": "half')  # what a kill within a write leaves
        assert ask(config, tmp_path, 9).num_kept == 4
        assert Counter(body["messages"][0]["content"] for body in server.bodies) == {f"{n}?": 1 for n in range(9)}
        assert answers(config, tmp_path, 9) == [f"to {n}?" for n in range(9)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(UserError, match=r"answers\.jsonl, line 2 is damaged"):
        AnswerJournal(tmp_path / "answers.jsonl")


def test_requests_are_known_by_their_content() -> None:
    config = config_of("http://localhost:1/v1")
    messages = [{"role": "user", "content": "q"}]
    same = {make_request(config, "q", messages, 0, 1).key for _ in range(2)}
    others = {
        make_request(config, "q", messages, 1, 1).key,
        make_request(config, "r", messages, 0, 1).key,
        make_request(config, "q", messages, 0, 2).key,
        make_request(config_of("http://localhost:1/v1", temperature=0.7), "q", messages, 0, 1).key,
    }
    assert (len(same), len(others | same)) == (1, 5)


# --- replies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_that_comes_apart(field: str) -> None:
    reply = parse_reply(json.dumps(completion("42", **{field: "why"})).encode())
    assert (reply.reasoning, reply.content) == ("why", "42")


def test_a_reply_that_was_cut_while_it_thought() -> None:
    reply = parse_reply(json.dumps(completion(None, reasoning_content="so", finish_reason="length")).encode())
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("so", "", "length")
    refused = parse_reply(json.dumps(completion(None, finish_reason="content_filter")).encode())
    assert (refused.content, refused.finish_reason) == ("", "content_filter")


@pytest.mark.parametrize(
    "data", [b"[]", b"{}", b"null", b'{"choices": [{}]}', b'{"choices": [{"message": 3}]}', b"[" * 99999]
)
def test_what_is_no_reply(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_reply(data)
