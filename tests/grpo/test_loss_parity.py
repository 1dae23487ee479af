"""Every recorded answer of TRL and verl: the same loss and the same gradient, by the mapping in grpo/peers.py."""

import copy
import json
from pathlib import Path

import pytest

from grpo.peers import UnsupportedPeerOptionError, case_options, check_case

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
COUNTS = {"trl_losses.json": 31, "verl_losses.json": 24}
TOLERANCE = 1e-8
NOT_SUPPORTED: dict[str, str] = {}
"""Cases (`file:index`) without a counterpart here, each with the reason."""


@pytest.fixture(scope="module", params=sorted(COUNTS))
def recorded(request):
    path = PARITY / request.param
    if not path.exists():
        pytest.skip(f"the recorded answers are not there: {path}")
    return request.param, json.loads(path.read_text())


def is_supported(case):
    try:
        case_options(case)
    except UnsupportedPeerOptionError:
        return False
    return True


def test_every_recorded_case_agrees_in_float64(recorded):
    name, cases = recorded
    assert len(cases) >= COUNTS[name]
    differences = {f"{name}:{i}": check_case(case) for i, case in enumerate(cases) if is_supported(case)}
    wrong = {case: difference for case, difference in differences.items() if not difference.worst <= TOLERANCE}
    assert wrong == {}


def test_the_list_of_unsupported_cases_is_exact(recorded):
    name, cases = recorded
    unsupported = {f"{name}:{i}" for i, case in enumerate(cases) if not is_supported(case)}
    assert unsupported == {case for case in NOT_SUPPORTED if case.startswith(name)}


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


def test_an_option_without_a_counterpart_is_named(recorded):
    _, cases = recorded
    for key, value in {"advantage_magic": 1, "kl_estimator": "k9"}.items():
        case = {**cases[0], "config": {**cases[0]["config"], key: value}}
        with pytest.raises(UnsupportedPeerOptionError, match=key):
            case_options(case)
    with pytest.raises(UnsupportedPeerOptionError, match="elsewhere"):
        case_options({**cases[0], "source": "elsewhere 1.0"})
