"""The sources of traces as a config file names them: a checkpoint, an endpoint, published rows, another run's traces."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.engine_config import EngineConfig
from rollout.tasks import DataConfig
from rollout.templates import check_template


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TagsConfig(_Table):
    """The marks in a teacher's text around its reasoning, and around its answer where there are some to take off."""

    think_open: str = Field(default="<think>", min_length=1, description="mark that opens the reasoning")
    think_close: str = Field(default="</think>", min_length=1, description="mark that closes the reasoning")
    answer_open: str = Field(default="", description="mark before the answer, taken off; empty: none is")
    answer_close: str = Field(default="", description="mark after the answer, taken off; empty: none is")


class TeacherConfig(_Table):
    """What every teacher that is asked has: questions, how often each is asked, and how the answers are sampled."""

    data: DataConfig = Field(description="the questions, with their answers for a verifier")
    num_questions: int | None = Field(default=None, ge=1, description="ask only the first so many; all without it")
    num_samples: int = Field(default=4, ge=1, description="answers to each question")
    temperature: float = Field(default=0.6, ge=0, description="temperature; 0 is greedy (DeepSeek-R1: 0.6)")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="probability that the kept tokens reach (DeepSeek-R1: 0.95)"
    )
    max_completion_tokens: int = Field(default=32768, ge=1, description="longest answer, in tokens")
    verifier: str | None = Field(
        default=None, description="verifier of the answers; by default the one that the question's row names"
    )
    tags: TagsConfig = Field(default_factory=TagsConfig, description="marks in the teacher's text")


class EngineSource(TeacherConfig):
    """A checkpoint that is sampled here."""

    kind: Literal["engine"] = Field(description="engine: sample a checkpoint")
    checkpoint: Path = Field(description="checkpoint folder of the teacher, with its tokenizer")
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default="chat", description="prompt template: chat, r1_zero, plain, or a text with {question}"
    )
    think_in_prompt: bool = Field(default=False, description="the template's prompt ends inside the think block")
    num_questions_per_call: int = Field(
        default=16, ge=1, description="questions of one call of the engines; what a kill may lose"
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="how the checkpoint is sampled")


class EndpointSource(TeacherConfig):
    """A server that speaks OpenAI's chat completions."""

    kind: Literal["endpoint"] = Field(description="endpoint: ask a server with OpenAI's chat completions")
    base_url: str = Field(description="address up to and with the version, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="model that the server is asked for")
    api_key_variable: str | None = Field(
        default=None, description="environment variable that holds the key; none: no key is sent"
    )
    system_prompt: str | None = Field(default=None, description="system message put before each question")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="the server's name for the longest answer"
    )
    send_seed: bool = Field(default=True, description="send a seed with each request; some servers refuse it")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="more fields of each request's body")
    num_concurrent: int = Field(default=8, ge=1, description="requests under way at once")
    requests_per_minute: float | None = Field(default=None, gt=0, description="requests started in a minute at most")
    timeout_s: float = Field(default=600.0, gt=0, description="longest time for one try of a request, in seconds")
    deadline_s: float = Field(
        default=3600.0, gt=0, description="longest time for a request with all its tries and waits, in seconds"
    )
    max_tries: int = Field(default=10, ge=1, description="tries of a request before it is given up")
    backoff_s: float = Field(default=1.0, gt=0, description="wait after a first failed try; doubles with each")
    max_backoff_s: float = Field(default=60.0, gt=0, description="longest such wait; Retry-After may ask for more")
    max_failures_in_row: int = Field(
        default=20, ge=1, description="requests given up in a row after which the run stops, keeping all answers"
    )

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not re.match(r"https?://[^/\s]+", url):
            raise ValueError("must begin with http:// or https://")
        return url.rstrip("/")


class ColumnsConfig(_Table):
    """Which columns of a row are what; 'a.b' reaches into a column.

    The answer is the last message of `messages`, or the text of `completion`, or `reasoning` with `answer_text`. The
    latter three may be lists, of one text for each answer to the row's question.
    """

    messages: str | None = Field(default=None, description="a list of messages, the last being the answer")
    role_key: str = Field(default="role", description="a message's field for who speaks")
    content_key: str = Field(default="content", description="a message's field for what is said")
    question: str | None = Field(default=None, description="the question: a text, or a list of messages")
    system: str | None = Field(default=None, description="a system prompt that belongs to the question")
    completion: str | None = Field(default=None, description="the teacher's whole text, or a list of such texts")
    reasoning: str | None = Field(default=None, description="the reasoning alone, or a list")
    answer_text: str | None = Field(default=None, description="the text after the reasoning, or a list")
    gold: str | None = Field(default=None, description="the known answer, for a verifier")
    gold_pattern: str | None = Field(
        default=None, description="regular expression whose one group is the known answer in its column"
    )
    id: str | None = Field(default=None, description="the question's id; by default the row's number")
    finish_reason: str | None = Field(default=None, description="how the answer ended, or a list")
    num_tokens: str | None = Field(default=None, description="the answer's length in tokens, or a list")
    metadata: tuple[str, ...] = Field(default=(), description="columns kept as metadata of the row's traces")
    answer_metadata: tuple[str, ...] = Field(
        default=(), description="columns that are lists with one value for each answer, kept as its metadata"
    )

    @field_validator("gold_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"must have exactly one group, around the answer, and has {groups}")
        return pattern

    @model_validator(mode="after")
    def _one_way(self) -> ColumnsConfig:
        parts = (self.reasoning is not None, self.answer_text is not None)
        if parts[0] != parts[1]:
            raise ValueError("reasoning and answer_text go together: set both or neither")
        ways = [self.messages is not None, self.completion is not None, all(parts)]
        if sum(ways) != 1:
            raise ValueError("set exactly one of messages, completion, and reasoning with answer_text")
        if (self.messages is None) == (self.question is None):
            raise ValueError("the question is in messages, or else in the column question: set exactly one")
        if self.gold_pattern is not None and self.gold is None:
            raise ValueError("gold_pattern needs the column gold")
        return self


class ImportSource(_Table):
    """Rows that someone has published or written."""

    kind: Literal["import"] = Field(description="import: rows of JSONL or Parquet files")
    path: Path = Field(description="a .jsonl or .parquet file, or a folder of them")
    columns: ColumnsConfig = Field(description="which columns are what")
    tags: TagsConfig = Field(default_factory=TagsConfig, description="marks in the teacher's text")
    teacher: str = Field(default="unknown", description="who wrote the answers")
    sampling: dict[str, Any] = Field(default_factory=dict, description="how they were sampled, as far as it is known")
    verifier: str | None = Field(default=None, description="verifier of the answers")
    max_rows: int | None = Field(default=None, ge=1, description="only the first so many rows")
    encoding: str = Field(default="utf-8", description="encoding of JSONL text; a byte order mark overrides it")
    fallback_encoding: str | None = Field(
        default=None, description="encoding of lines that are not valid in the first, such as cp1252"
    )
    on_broken: Literal["skip", "stop"] = Field(
        default="skip", description="rows that can't be read: skip them (listed in errors.jsonl), or stop at the first"
    )
    max_line_bytes: int = Field(default=2**26, ge=1024, description="a longer line is a broken one")

    @field_validator("encoding", "fallback_encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        try:
            codecs.lookup(encoding or "utf-8")
        except LookupError as error:
            raise ValueError(f"there is no encoding {encoding!r}") from error
        return encoding


class TracesSource(_Table):
    """Traces that another run has kept, so that they can be selected anew without being sampled again."""

    kind: Literal["traces"] = Field(description="traces: Parquet of an earlier traces run")
    path: Path = Field(description="traces.parquet, or a folder of parts such as <run>/raw/<source>")
    keep_verdicts: bool = Field(default=True, description="keep their verdicts; false: they are judged again")


Source = Annotated[EngineSource | EndpointSource | ImportSource | TracesSource, Field(discriminator="kind")]
