"""Recorded answers of TRL and verl: the same loss and the same gradient, by the mapping of grpo/peer_trl.py and peer_verl.py.

`../shared/parity` holds 55; tests/grpo/parity has 61 more, small, of the options that those leave out: TRL 1.16.0's own
`GRPOTrainer._compute_loss` and the functions of verl 0.9.1's core_algos, run on random float64 tensors.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from grpo.peers import TOLERANCE, BrokenCaseError, UnsupportedPeerOptionError, case_options, check_case

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
OURS = Path(__file__).parent / "parity"
COUNTS = {"trl_losses.json": 31, "verl_losses.json": 24, "trl_more.json": 20, "verl_more.json": 41}


@pytest.fixture(scope="module", params=sorted(COUNTS))
def recorded(request):
    folder = OURS if request.param.endswith("_more.json") else SHARED
    path = folder / request.param
    if not path.exists():
        assert folder == SHARED, f"{path} belongs to the project"
        pytest.skip(f"the recorded answers are not there: {path}")
    return request.param, json.loads(path.read_text())


@pytest.fixture
def case() -> Any:
    return json.loads((OURS / "trl_more.json").read_text())[0]


@pytest.fixture
def verl_case() -> Any:
    return json.loads((OURS / "verl_more.json").read_text())[0]


def test_every_recorded_case_agrees_in_float64(recorded):
    name, cases = recorded
    assert len(cases) >= COUNTS[name]
    differences = {f"{name}:{i}": check_case(case) for i, case in enumerate(cases)}
    wrong = {case: difference for case, difference in differences.items() if not difference.worst <= TOLERANCE}
    assert wrong == {}


def test_a_changed_answer_is_noticed(recorded):
    _, cases = recorded
    for key in ("loss", "advantages", "grad_logprobs"):
        changed = copy.deepcopy(cases[0])
        value = changed[key]
        if key == "loss":
            changed[key] = value + 1e-6
        elif key == "advantages":
            value[0] += 1e-6
        else:
            value[0][0] += 1e-6
        assert check_case(changed).worst > TOLERANCE
        assert check_case({**cases[0], "loss": math.nan}).worst != check_case(cases[0]).worst


def test_an_option_without_a_counterpart_is_named(recorded):
    _, cases = recorded
    for key, value in {"advantage_magic": 1, "kl_estimator": "k9", "advantage_std": "median"}.items():
        case = {**cases[0], "config": {**cases[0]["config"], key: value}}
        with pytest.raises(UnsupportedPeerOptionError, match=r"advantage_magic|kl_estimator|advantage_std"):
            case_options(case)
    with pytest.raises(UnsupportedPeerOptionError, match="elsewhere"):
        case_options({**cases[0], "source": "elsewhere 1.0"})


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("loss_type", "ppo2", "loss_type"),
        ("importance_level", "word", "importance_level"),
        ("clip_low", "a lot", "clip_low"),
        ("clip_low", True, "clip_low"),
        ("epsilon", 0.3, "different things"),
        ("top_entropy_quantile", 0.2, "top_entropy_quantile"),
        ("entropy_coef", 0.1, "entropy_coef"),
        ("vllm_importance_sampling_mode", "word_mask", "vllm_importance_sampling_mode"),
        ("scale_rewards", ["group"], "advantage_std"),
    ],
)
def test_a_value_without_a_counterpart_in_trl_is_named(case, option, value, name):
    config = {**case["config"], option: value}
    with pytest.raises(UnsupportedPeerOptionError, match=name):
        check_case({**case, "config": config})


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("policy_loss", "clip_cov", "policy_loss"),
        ("aggregation", "mean", "aggregation"),
        ("kl_estimator", "full", "kl_estimator"),
        ("kl_estimator", 3, "kl_estimator"),
    ],
)
def test_a_value_without_a_counterpart_in_verl_is_named(verl_case, option, value, name):
    with pytest.raises(UnsupportedPeerOptionError, match=name):
        check_case({**verl_case, "config": {**verl_case["config"], option: value}})


def test_missing_options_have_the_peers_defaults(case, verl_case):
    trl = case_options({**case, "config": {}})
    assert trl.advantage == {"baseline": "group_mean", "std": "group", "ddof": 1, "eps": 1e-4}
    (part,) = trl.parts
    assert part.weights == {"aggregation": "token_mean"}
    assert (part.loss["clip_low"], part.loss["clip_high"], part.loss["kl_coef"]) == (0.2, 0.2, 0.0)
    assert part.loss["log_ratio_bounds"] == (-math.inf, math.inf)
    verl = case_options({**verl_case, "config": {}})
    assert verl.advantage == {"baseline": "group_mean", "std": "group", "ddof": 1, "eps": 1e-6}
    (part,) = verl.parts
    assert (part.loss["dual_clip"], part.loss["clip_low"], part.loss["clip_high"]) == (3.0, 0.2, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "'loss' is NoneType"),
        ({"inputs": {}}, "lack completion_mask, logprobs, rewards"),
        ({"advantages": [1.0]}, "'advantages' has the shape"),
        ({"grad_logprobs": [["x"]]}, "cannot be read"),
    ],
)
def test_a_broken_case_is_named(case, change, message):
    with pytest.raises(BrokenCaseError, match=message):
        check_case({**case, **change})


def test_a_case_without_its_parts_is_named(case):
    del case["grad_logprobs"]
    with pytest.raises(BrokenCaseError, match="no 'grad_logprobs'"):
        check_case(case)
