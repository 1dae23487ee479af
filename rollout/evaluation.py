"""Measurement on held-out tasks: pass@1 as a mean of samples, pass@k by the unbiased estimator, majority@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rollout.engine import Engine, SamplingParams
from rollout.records import Group, Sample, Task, seed_for
from rollout.sampling import Prompter, sample_groups, score_groups
from verifiers.pool import ScorePool

FAILED = ("error", "timeout")
EVAL_STEP = -1  # the step that seeds of evaluation samples are made of: no training step has it


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Means over problems; `greedy` is the accuracy of one sample each at temperature 0 (None if not asked for),
    `num_failed` how many samples the verifier could not judge: they count as not correct."""

    pass_at_1: float
    pass_at_k: float
    majority_at_k: float
    k: int
    num_problems: int
    num_samples: int
    greedy: float | None
    num_failed: int
    completion_tokens_mean: float

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values."""
        return asdict(self)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples drawn without replacement is correct: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} can't be estimated from {num_samples} samples")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(samples: Sequence[Sample], k: int) -> float:
    """Share of the disjoint runs of k samples whose most frequent answer is correct.

    Correct answers count as one answer however they are written; samples without an answer don't vote; of equally
    frequent answers the one that came first wins.
    """
    hits, chunks = 0, len(samples) // k
    for chunk in range(chunks):
        votes: Counter[tuple[bool, str]] = Counter()
        for sample in samples[chunk * k : (chunk + 1) * k]:
            assert sample.verdict is not None
            if sample.verdict.status == "correct":
                votes[True, ""] += 1
            elif sample.verdict.extracted is not None:
                votes[False, sample.verdict.extracted] += 1
        hits += bool(votes) and votes.most_common(1)[0][0][0]
    return hits / chunks


def is_correct(sample: Sample) -> bool:
    """Whether the verdict's status is `correct`."""
    return sample.verdict is not None and sample.verdict.status == "correct"


def evaluate(
    engine: Engine,
    prompter: Prompter,
    pool: ScorePool,
    tasks: Sequence[Task],
    params: SamplingParams,
    *,
    num_samples: int,
    k: int,
    seed: int,
    greedy: bool = True,
) -> tuple[EvalResult, list[Group]]:
    """Sample and score `num_samples` completions per task; the same seed draws the same random numbers again."""

    def groups_of(parameters: SamplingParams, size: int) -> list[Group]:
        sampled = sample_groups(
            engine, prompter, tasks, parameters, size, lambda task_id, index: seed_for(seed, EVAL_STEP, task_id, index)
        )
        return score_groups(pool, sampled)

    groups = groups_of(params, num_samples)
    correct = [sum(map(is_correct, group.samples)) for group in groups]
    lengths = [len(sample.completion_ids) for group in groups for sample in group.samples]
    greedy_accuracy = None
    if greedy:
        best = SamplingParams(
            temperature=0.0, max_completion_tokens=params.max_completion_tokens, stop_token_ids=params.stop_token_ids
        )
        greedy_accuracy = sum(is_correct(group.samples[0]) for group in groups_of(best, 1)) / len(groups)
    result = EvalResult(
        pass_at_1=sum(correct) / (num_samples * len(groups)),
        pass_at_k=sum(pass_at_k(num_samples, c, k) for c in correct) / len(groups),
        majority_at_k=sum(majority_at_k(group.samples, k) for group in groups) / len(groups),
        k=k,
        num_problems=len(groups),
        num_samples=num_samples,
        greedy=greedy_accuracy,
        num_failed=sum(s.verdict is None or s.verdict.status in FAILED for g in groups for s in g.samples),
        completion_tokens_mean=sum(lengths) / len(lengths),
    )
    return result, groups
