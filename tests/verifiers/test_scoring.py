"""`score`: a batch of verdicts in one call."""

import verifiers
from verifiers import PlainTask


def test_one_call_scores_a_batch_with_options_and_progress():
    seen = []
    verdicts = verifiers.score(
        ["x" * 3, "x" * 6],
        [PlainTask(None), PlainTask(None)],
        "length",
        options={"longest": 5},
        num_workers=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [verdict.score for verdict in verdicts] == [0.0, -1.0]
    assert seen[-1] == (2, 2)
    assert verifiers.score([], [], "numeric") == []
