"""Asks an OpenAI-compatible endpoint: paced, retried within a deadline, every answer on disk before the next question."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from distill.answers import AnswerJournal, Reply, Request
from distill.trace import valid_text
from distill.traces_config import EndpointSource
from rollout.errors import UserError

MAX_REPLY_BYTES = 2**26
_STOPS_ALL = {401: "refuses the key", 402: "asks for payment", 403: "refuses access", 404: "does not know the address"}
_POLL_S = 0.2


class EndpointError(RuntimeError):
    """The endpoint can't be asked any more; all answers so far are kept."""


def make_request(
    config: EndpointSource, question_id: str, messages: Iterable[Mapping[str, str]], sample_index: int, seed: int
) -> Request:
    """The request for one answer to chat messages."""
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [*system, *(dict(message) for message in messages)],
        "temperature": config.temperature,
        "top_p": config.top_p,
        config.max_tokens_field: config.max_completion_tokens,
    }
    if config.send_seed:
        body["seed"] = seed
    body |= config.extra_body
    named = json.dumps([config.base_url, question_id, sample_index, body], sort_keys=True)
    key = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
    return Request(key=key, question_id=question_id, sample_index=sample_index, body=body)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A request that was given up."""

    question_id: str
    sample_index: int
    reason: str


@dataclass
class Tally:
    """What came of the requests: those answered earlier, answered now, given up; `num_unread` tries, sent and maybe
    charged, whose reply did not come whole."""

    num_kept: int = 0
    num_answered: int = 0
    num_tries: int = 0
    num_unread: int = 0
    failures: tuple[Failure, ...] = ()


# --- what a server says ----------------------------------------------------------------------------------------------


class _TryFailedError(Exception):
    """One try failed in a way that another may not; `wait_s` is what the server asked for, `unread` a lost reply."""

    def __init__(self, reason: str, *, wait_s: float = 0.0, unread: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.unread = wait_s, unread


class _RefusedError(Exception):
    """The server will not answer this request."""


def parse_reply(data: bytes) -> Reply:
    """The answer in a chat completion's JSON; ValueError says what is wrong with it.

    Reasoning is taken from `reasoning_content` (DeepSeek, vLLM) or `reasoning` (OpenRouter); what stands inline in
    the content stays there. An answer without any text is none, unless its finish reason says why.
    """
    try:
        payload = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(payload, dict) and payload.get("error"):
        raise ValueError(f"an error as an answer: {json.dumps(payload['error'])[:200]}")
    try:
        choice = payload["choices"][0]
        message = choice["message"]
        content, finish_reason = message.get("content"), choice.get("finish_reason")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError("it is not a chat completion") from error
    if not isinstance(content, str | None) or not isinstance(reasoning, str | None):
        raise ValueError("the message's content is not text")
    if not (content or reasoning) and finish_reason in (None, "stop"):
        raise ValueError("the message is empty")
    usage = payload.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(
        content=valid_text(content or ""),
        reasoning=valid_text(reasoning) if reasoning else None,
        finish_reason=finish_reason if isinstance(finish_reason, str) else None,
        num_tokens=count if isinstance(count, int) else None,
        model=_text_or_none(payload.get("model")),
        reply_id=_text_or_none(payload.get("id")),
    )


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def retry_after_s(value: str | None, now: float) -> float:
    """The wait that a Retry-After header asks for, seconds or an HTTP date against `now` (Unix time); 0 without one."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return 0.0


# --- asking ----------------------------------------------------------------------------------------------------------


def api_key(config: EndpointSource) -> str | None:
    """The key from the environment; UserError where its variable is not set."""
    if config.api_key_variable is None:
        return None
    key = os.environ.get(config.api_key_variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {config.api_key_variable} (api_key_variable) is not set: put the key in it."
        )
    return key


def ask_all(
    config: EndpointSource,
    requests: Iterable[Request],
    journal: AnswerJournal,
    *,
    seed: int,
    stop: threading.Event,
    progress: Callable[[Tally], None],
) -> Tally:
    """Ask what the journal does not hold yet; returns when every request is answered or given up, or `stop` is set.

    EndpointError after `max_failures_in_row`, or when the server refuses the key, payment or address.
    """
    asking = _Asking(config, journal, api_key(config), seed, stop, progress)
    asyncio.run(asking.run(iter(requests)))
    if asking.fatal is not None:
        raise asking.fatal
    return asking.tally


class _Pace:
    """Spreads the starts of requests evenly over time, and holds all of them back while the server asks for it."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval_s = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self.blocked_until = 0.0

    def reserve(self) -> float:
        """The time (monotonic) at which the caller may start."""
        self._next = max(time.monotonic(), self._next, self.blocked_until)
        start = self._next
        self._next += self._interval_s
        return start


class _Asking:
    """One call of `ask_all`."""

    def __init__(
        self,
        config: EndpointSource,
        journal: AnswerJournal,
        key: str | None,
        seed: int,
        stop: threading.Event,
        progress: Callable[[Tally], None],
    ) -> None:
        self.config, self.journal, self.stop, self.progress = config, journal, stop, progress
        self.tally = Tally()
        self.fatal: EndpointError | None = None
        self._key = key
        self._pace = _Pace(config.requests_per_minute)
        self._random = random.Random(seed)
        self._failures_in_row = 0

    @property
    def _ending(self) -> bool:
        return self.fatal is not None or self.stop.is_set()

    async def run(self, requests: Iterator[Request]) -> None:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.config.num_concurrent)
        async with (
            httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client,  # _try sets the time
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self.config.num_concurrent):
                group.create_task(self._work(client, requests))

    async def _work(self, client: httpx.AsyncClient, requests: Iterator[Request]) -> None:
        while not self._ending and (request := next(requests, None)) is not None:
            if request.key in self.journal:
                self.tally.num_kept += 1
                continue
            try:
                reply = await self._ask(client, request)
            except _RefusedError as error:
                self._give_up(request, str(error))
                continue
            if reply is None:
                return
            self.journal.keep(request, reply)
            self._failures_in_row = 0
            self.tally.num_answered += 1
            self.progress(self.tally)

    def _give_up(self, request: Request, reason: str) -> None:
        failure = Failure(question_id=request.question_id, sample_index=request.sample_index, reason=reason)
        self.tally.failures += (failure,)
        self._failures_in_row += 1
        if self._failures_in_row >= self.config.max_failures_in_row:
            self._end(f"{self._failures_in_row} requests in a row were given up, the last because {reason}")
        self.progress(self.tally)

    def _end(self, reason: str) -> None:
        if self.fatal is None:
            self.fatal = EndpointError(
                f"{self.config.base_url}: {reason}. The {len(self.journal)} answers so far are kept, and none of them is "
                "asked for again."
            )

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> Reply | None:
        """The reply after as many tries as it takes; None where everything ends first, _RefusedError to give it up."""
        began: float | None = None
        for number in range(1, self.config.max_tries + 1):
            if not await self._sleep_until(self._pace.reserve()):
                return None
            began = began or time.monotonic()
            left = max(0.0, self.config.deadline_s - (time.monotonic() - began))
            try:
                self.tally.num_tries += 1
                return await self._try(client, request, min(left, self.config.timeout_s))
            except _TryFailedError as error:
                self.tally.num_unread += error.unread
                wait = max(error.wait_s, self._backoff_s(number))
                left = self.config.deadline_s - (time.monotonic() - began)
                if number == self.config.max_tries or wait >= left:
                    spent = time.monotonic() - began
                    raise _RefusedError(f"{number} tries in {spent:.0f} s failed, the last: {error}") from error
                if error.wait_s:  # the server is busy for everyone
                    self._pace.blocked_until = max(self._pace.blocked_until, time.monotonic() + error.wait_s)
                if not await self._sleep_until(time.monotonic() + wait):
                    return None
        raise AssertionError("the last try returns or raises")

    def _backoff_s(self, number: int) -> float:
        """Exponential, between half and all of it, so that requests that failed together do not come back together."""
        longest = min(self.config.backoff_s * 2.0 ** (number - 1), self.config.max_backoff_s)
        return longest * self._random.uniform(0.5, 1.0)

    async def _sleep_until(self, moment: float) -> bool:
        """Sleep, and say whether to go on; ends early when everything ends."""
        while not self._ending and (left := moment - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _POLL_S))
        return not self._ending

    async def _try(self, client: httpx.AsyncClient, request: Request, timeout_s: float) -> Reply | None:
        try:
            async with asyncio.timeout(timeout_s):
                status, headers, data = await self._post(client, request)
        except TimeoutError as error:
            raise _TryFailedError(f"no whole reply within {timeout_s:.0f} s", unread=True) from error
        except httpx.ConnectError as error:
            raise _TryFailedError(f"no connection: {error}") from error
        except httpx.InvalidURL as error:
            self._end(f"base_url is no address ({error})")
            return None
        except httpx.HTTPError as error:
            raise _TryFailedError(f"the reply broke off ({type(error).__name__}: {error})", unread=True) from error
        if status == 200:
            try:
                return parse_reply(data)
            except ValueError as error:
                raise _TryFailedError(f"the reply can't be used: {error}", unread=True) from error
        shown = self._shown(data)
        if status in (408, 409, 425, 429) or status >= 500:
            wait_s = retry_after_s(headers.get("retry-after"), time.time())
            raise _TryFailedError(f"status {status}: {shown}", wait_s=wait_s)
        if status in _STOPS_ALL:
            self._end(f"the server {_STOPS_ALL[status]} (status {status}: {shown})")
            return None
        raise _RefusedError(f"status {status}: {shown}")

    async def _post(self, client: httpx.AsyncClient, request: Request) -> tuple[int, httpx.Headers, bytes]:
        url = f"{self.config.base_url}/chat/completions"
        async with client.stream("POST", url, json=dict(request.body)) as response:
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_REPLY_BYTES:
                    raise _TryFailedError(f"the reply is longer than {MAX_REPLY_BYTES} bytes", unread=True)
            return response.status_code, response.headers, bytes(data)

    def _shown(self, data: bytes) -> str:
        text = data[:300].decode("utf-8", "replace").strip()
        return text.replace(self._key, "(key)") if self._key else text
