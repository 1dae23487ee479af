"""A person's judgements on a run's verdicts, kept in the run folder, and the verifier tried on them again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.durable import append_line
from rollout.errors import UserError
from rollout.run import CONFIG
from scripts.verifier_suspects import Suspect, gold_of
from verifiers.pool import ScorePool, VerifierSpec
from verifiers.task import PlainTask
from verifiers.verdict import Verdict

JUDGEMENTS = "judgements.jsonl"
CHOICES = {"c": "correct", "w": "wrong"}
MAX_SHOWN_CHARS = 4000


@dataclass(frozen=True)
class Judgement:
    """What a person says of one sample (`expected`), beside what the verifier said (`status`), and what it was about."""

    expected: str
    status: str
    rule: str
    step: int
    phase: str
    task_id: str
    sample_index: int
    prompt: str
    completion: str
    answer: Any


@dataclass(frozen=True)
class Disagreement:
    """A judged case on which the verifier still, or again, says something else."""

    judgement: Judgement
    verdict: Verdict


def judge(run: Path, suspects: Sequence[Suspect], ask: Callable[[str], str], show: Callable[[str], None]) -> int:
    """Show every suspect that is not judged yet and save the answer of `ask` at once; the number judged.

    c: the completion is correct; w: it is wrong; s or nothing: skip; q: stop.
    """
    known = {_key(judgement) for judgement in read_judgements(run)} if (run / JUDGEMENTS).exists() else set()
    count = 0
    for suspect in suspects:
        judgement = _judgement(suspect)
        if _key(judgement) in known:
            continue
        known.add(_key(judgement))
        show(_shown(suspect))
        answer = ask("[c]orrect, [w]rong, [s]kip, [q]uit").strip().lower()[:1]
        if answer == "q":
            break
        if answer in CHOICES:
            row = {**asdict(judgement), "expected": CHOICES[answer]}
            append_line(run / JUDGEMENTS, json.dumps(row, ensure_ascii=False))
            count += 1
    return count


def read_judgements(run: Path) -> list[Judgement]:
    """The judgements of a run folder, the last one on a sample counting; UserError if there are none, or damaged ones."""
    path = run / JUDGEMENTS
    if not path.exists():
        raise UserError(
            f"{path} does not exist: judge some verdicts first, with `groupzero verifier-report {run} --judge`"
        )
    judgements: dict[tuple[Any, ...], Judgement] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            judgement = Judgement(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a judgement ({error}). Mend or remove that line.") from error
        judgements[_key(judgement)] = judgement
    return list(judgements.values())


def check_judgements(run: Path, num_workers: int = 2) -> tuple[int, list[Disagreement]]:
    """Run the run's verifiers on all judged cases: how many there are, and those where `correct` or not differs.

    Metadata columns are not among a run's samples: a verifier that needs them fails here, which is a disagreement.
    """
    judgements = read_judgements(run)
    timeout_s, memory_limit_mb, specs = _scoring(run)
    with ScorePool(specs, num_workers, timeout_s, memory_limit_mb) as pool:
        verdicts = pool.score(
            [judgement.completion for judgement in judgements],
            [PlainTask(judgement.answer, judgement.prompt) for judgement in judgements],
        )
    pairs = zip(judgements, verdicts, strict=True)
    found = [Disagreement(j, v) for j, v in pairs if v.status in ("error", "timeout") or _differs(j, v)]
    return len(judgements), found


def _differs(judgement: Judgement, verdict: Verdict) -> bool:
    return (verdict.status == "correct") != (judgement.expected == "correct")


def _scoring(run: Path) -> tuple[float, int, list[VerifierSpec]]:
    path = run / CONFIG
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
        rewards = config["rewards"]
        specs = [
            VerifierSpec(r["name"], r["verifier"], r.get("weight", 1.0), r.get("options", {}), r.get("timeout_s"))
            for r in rewards
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {run} isn't a run's folder.") from error
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} names no verifiers ({error!r}).") from error
    scoring = config.get("scoring", {})
    return scoring.get("timeout_s", 5.0), scoring.get("memory_limit_mb", 1024), specs


def _judgement(suspect: Suspect) -> Judgement:
    row = suspect.row
    return Judgement(
        expected="",
        status=row["status"],
        rule=suspect.rule,
        step=row["step"],
        phase=row["phase"],
        task_id=row["task_id"],
        sample_index=row["sample_index"],
        prompt=row["prompt"],
        completion=row["completion"],
        answer=gold_of(row),
    )


def _key(judgement: Judgement) -> tuple[Any, ...]:
    return judgement.step, judgement.phase, judgement.task_id, judgement.sample_index


def _shown(suspect: Suspect) -> str:
    row = suspect.row
    text = row["completion"]
    if len(text) > MAX_SHOWN_CHARS:
        text = f"[{len(text) - MAX_SHOWN_CHARS} characters left out] …{text[-MAX_SHOWN_CHARS:]}"
    return (
        f"\n{'-' * 78}\n{suspect.rule}: {suspect.why}\n"
        f"step {row['step']}, {row['phase']}, task {row['task_id']}, sample {row['sample_index']}: "
        f"{row['status']} {row['score']:g} ({row['reason']})\n\n{row['prompt'][-MAX_SHOWN_CHARS:]}\n\n{text}\n\n"
        f"gold: {gold_of(row)!r:.500}"
    )
