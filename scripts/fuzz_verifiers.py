"""Fuzz the extraction and the `math` verifier for some minutes, from a corpus of real answers.

`python -m scripts.fuzz_verifiers CORPUS... --minutes 10 --out findings.jsonl`. A corpus file is JSONL; every text under
`answer`, `completion`, `gold`, `pred` or `gt` is a seed. With atheris installed, its coverage guides the mutation; without
it, ours does: splice, repeat, delete, swap and insert pieces of LaTeX.

A finding is a call that raises, takes over `--slow-s` of CPU time, returns no Verdict, or grows the process by over
`--growth-mb`.
Every call has an alarm, so that a call which never ends is a finding too.
"""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from rollout.errors import UserError
from scripts.bench_magnitude import peak_mb
from verifiers import Status, Verdict, resolve
from verifiers.extract import stated_answer
from verifiers.task import PlainTask

SEED_KEYS = ("answer", "completion", "gold", "pred", "gt")
MAX_SEED_CHARS = 2_000
MAX_INPUT_CHARS = 6_000
HANG_S = 10
PIECES = (
    *"{}()[]|$^_&%!,.;:=<>+-*/\\ \n0123456789abcxyzeinpi",
    *("\\frac", "\\sqrt", "\\sqrt[3]", "\\left(", "\\right)", "\\{", "\\}", "\\cdot", "\\times", "\\pm", "\\text{", "\\boxed{"),
    *("\\sin", "\\log_", "\\binom", "\\sum_{k=1}^{n}", "\\int_0^1", "\\infty", "\\pi", "\\cup", "\\cap", "\\in", "\\mid", "\\le"),
    *("\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\begin{cases}", "\\end{cases}", "^\\circ", "\\overline{", "\\%", "!!"),
    *("10^{10^{10}}", "9^{9^{9}}", "(10^9)!", "1e999999", "0.\\overline{3}", "\\frac{1}{0}", "0^0", "i^i", "½", "²", "∞", "５"),
    *("<answer>", "</answer>", "<think>", "</think>", "The final answer is ", "答案是", "####", " or ", "\x00", "\ud800"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One call that broke a law: what it did, and the two texts that make it happen."""

    what: str
    gold: str
    completion: str
    seconds: float
    growth_mb: float


class _HangError(BaseException):
    """The alarm rang in a call; not an Exception, so that no verifier can hold it."""


def seeds(paths: Sequence[Path]) -> list[str]:
    """Every text of the corpus, each once, none longer than `MAX_SEED_CHARS`; raises UserError for an unusable file."""
    found: dict[str, None] = {}
    for path in paths:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as exc:
            raise UserError(f"the corpus {path} can't be read: {exc}") from exc
        for row in rows:
            texts = (row.get(key) for key in SEED_KEYS)
            found.update((text[-MAX_SEED_CHARS:], None) for text in texts if isinstance(text, str) and text)
    if not found:
        raise UserError(f"the corpus has no text under {', '.join(SEED_KEYS)}")
    return list(found)


def mutate(text: str, corpus: Sequence[str], rng: random.Random) -> str:
    """`text` after one to six random edits, at most `MAX_INPUT_CHARS` long."""
    for _ in range(rng.randint(1, 6)):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice((0, 1, 2, 5, 20)))
        piece = text[start:end]
        edit = rng.randrange(7)
        if edit == 0:
            text = text[:start] + text[end:]
        elif edit == 1:
            text = text[:start] + rng.choice(PIECES) + text[start:]
        elif edit == 2:
            text = text[:end] + piece * rng.choice((1, 2, 8, 200)) + text[end:]
        elif edit == 3:
            other = rng.choice(corpus)
            cut = rng.randint(0, len(other))
            text = text[:start] + other[cut : cut + rng.choice((3, 10, 50))] + text[end:]
        elif edit == 4:
            text = text[:start] + rng.choice(PIECES) * rng.choice((1, 3, 50, 1000)) + text[end:]
        elif edit == 5:
            text = text[:start] + piece[::-1] + text[end:]
        else:
            opening, closing = rng.choice(
                (("{", "}"), ("\\frac{", "}{2}"), ("\\sqrt{", "}"), ("(", ")!"), ("2^{", "}"), ("|", "|"))
            )
            times = rng.choice((1, 3, 60))
            text = opening * times + text + closing * times
        text = text[:MAX_INPUT_CHARS]
    return text


def check(verifier: Any, gold: str, completion: str, slow_s: float, growth_mb: float) -> Finding | None:
    """Judge one pair and say which law it broke, if any."""
    before, start = peak_mb(), time.process_time()  # on a busy machine wall time accuses innocent calls
    what = ""
    signal.alarm(HANG_S)
    try:
        for text in (completion, gold):
            stated_answer(text, last_number=True)
        verdict = verifier(completion, PlainTask(answer=gold))
        if not isinstance(verdict, Verdict) or verdict.status not in get_args(Status):
            what = f"returned {verdict!r:.100}"
        elif verdict.score != (1.0 if verdict.status == "correct" else 0.0):
            what = f"score {verdict.score} with status {verdict.status}"
        else:
            json.dumps(verdict.to_dict())
    except _HangError:
        what = f"no end after {HANG_S} s"
    except (Exception, RecursionError) as exc:  # noqa: BLE001  (whatever it raises is the finding)
        what = f"{type(exc).__name__}: {exc}"[:300]
    finally:
        signal.alarm(0)
    seconds, growth = time.process_time() - start, peak_mb() - before
    if not what and seconds > slow_s:
        what = "slow"
    if not what and growth > growth_mb:
        what = "growth"
    return Finding(what, gold, completion, round(seconds, 3), round(growth, 1)) if what else None


def _ring(signum: int, frame: Any) -> None:
    raise _HangError


def inputs(corpus: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless pairs (gold, completion): one side as it is or both mutated, the answer bare or in a box."""
    while True:
        gold, answer = rng.choice(corpus), rng.choice(corpus)
        if rng.random() < 0.5:
            answer = gold
        if rng.random() < 0.5:
            gold = mutate(gold, corpus, rng)
        answer = mutate(answer, corpus, rng)
        yield gold, answer if rng.random() < 0.3 else f"\\boxed{{{answer}}}"


def fuzz_with_atheris(
    corpus: Sequence[str], verifier: Any, out: Path, minutes: float, slow_s: float, growth_mb: float
) -> None:
    """Coverage-guided; does not return, since libFuzzer ends the process."""
    import atheris  # pyright: ignore[reportMissingImports]

    folder = out.with_suffix(".corpus")
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(corpus):
        (folder / str(index)).write_text(text, encoding="utf-8", errors="surrogatepass")

    def one(data: bytes) -> None:
        gold, _, completion = data.decode("utf-8", "replace").partition("\x00")
        if finding := check(verifier, gold, completion or f"\\boxed{{{gold}}}", slow_s, growth_mb):
            _record(out, finding)

    atheris.Setup(
        [sys.argv[0], str(folder), f"-max_total_time={int(60 * minutes)}", f"-max_len={MAX_INPUT_CHARS}"], one
    )
    atheris.Fuzz()


def _record(out: Path, finding: Finding) -> None:
    with out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(finding)) + "\n")


def main(
    corpus: Annotated[list[Path], typer.Argument(help="JSONL files whose texts are the seeds.")],
    out: Annotated[Path, typer.Option(help="Findings, one JSON object a line, appended.")],
    minutes: Annotated[float, typer.Option(min=0.01)] = 10.0,
    seed: Annotated[int, typer.Option()] = 0,
    slow_s: Annotated[float, typer.Option(help="A call over this many seconds is a finding.")] = 1.0,
    growth_mb: Annotated[float, typer.Option(help="A call that grows the peak by more is a finding.")] = 100.0,
) -> None:
    """Fuzz until the time is up and print how many calls were made and how many findings there are."""
    texts = seeds(corpus)
    verifier = resolve("math")
    verifier("\\boxed{\\sin^2 x+\\cos^2 x}", PlainTask(answer="1"))  # imports are not growth
    signal.signal(signal.SIGALRM, _ring)
    if importlib.util.find_spec("atheris") is not None:
        fuzz_with_atheris(texts, verifier, out, minutes, slow_s, growth_mb)
    pairs = inputs(texts, random.Random(seed))
    deadline = time.monotonic() + 60 * minutes
    num_calls = num_findings = 0
    while time.monotonic() < deadline:
        gold, completion = next(pairs)
        num_calls += 1
        if finding := check(verifier, gold, completion, slow_s, growth_mb):
            num_findings += 1
            _record(out, finding)
    typer.echo(f"{num_calls} calls from {len(texts)} seeds in {minutes:g} min: {num_findings} findings in {out}")


if __name__ == "__main__":
    typer.run(main)
