"""Engines in Ray actors: order, causes of death, time limits, Ctrl-C and silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from policy.checkpoint import hf_state_dict
from policy.deepseek import DeepseekPolicy
from rollout import cluster
from rollout.cluster import (
    EngineConfig,
    EnginePool,
    Rank,
    RankError,
    RankGroup,
    RayEngine,
    build_engine,
    last_lines,
    running_cluster,
    start_engine,
    start_engines,
)
from rollout.engine import SamplingParams
from rollout.engine_checks import EngineError
from rollout.torch_engine import TorchEngine
from rollout.weights import WeightSync, WeightSyncError

MakePolicy = Callable[[int], DeepseekPolicy]
PARAMS = SamplingParams(max_completion_tokens=8)
TORCH = EngineConfig(kind="torch", max_model_len=128)


@pytest.fixture
def torch_actor(ray_cluster: Path, checkpoint_dir: Path, tmp_path: Path) -> Iterator[RayEngine]:
    """A torch engine in an actor, with short limits."""
    config = TORCH.model_copy(update={"generate_timeout_s": 5.0, "sync_timeout_s": 2.0})
    engine = start_engine(config, checkpoint_dir, tmp_path / "engine-0.log")
    yield engine
    engine.close()


@pytest.mark.stack
def test_an_actor_answers_as_the_engine_itself_and_its_death_is_explained(
    torch_actor: RayEngine, make_policy: MakePolicy, prompts: list[list[int]], checkpoint_dir: Path
) -> None:
    import ray

    local = build_engine(TORCH, checkpoint_dir)
    seeds = list(range(8))
    assert torch_actor.generate(prompts, PARAMS, seeds) == local.generate(prompts, PARAMS, seeds)
    for engine in (torch_actor, local):
        engine.load_weights(hf_state_dict(make_policy(1)), 2)
    assert torch_actor.generate(prompts, PARAMS, seeds) == local.generate(prompts, PARAMS, seeds)

    def say(_host: object) -> int:
        print("the last words", flush=True)
        return os.getpid()

    os.kill(ray.get(torch_actor.actor.__ray_call__.remote(say)), signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        torch_actor.generate(prompts, PARAMS, seeds)
    message = str(caught.value)
    assert message.startswith("engine-0 failed while generating 8 completions with version 2: its process died")
    assert "worker process has died" in message
    assert str(torch_actor.log_path) in message
    assert "the last words" in message


@pytest.mark.stack
def test_a_sync_or_a_generation_that_hangs_fails_in_time(
    torch_actor: RayEngine, make_policy: MakePolicy, prompts: list[list[int]]
) -> None:
    import ray

    def slow_down(host: object) -> None:
        host.engine.load_weights = lambda weights, version: time.sleep(4)  # type: ignore[attr-defined]
        host.engine.generate = lambda prompts, params, seeds: time.sleep(60)  # type: ignore[attr-defined]

    ray.get(torch_actor.actor.__ray_call__.remote(slow_down))
    start = time.monotonic()
    expected = (
        r"version 3 .*did not reach(.|\n)*while loading the weights of version 3: no answer within 2 s(.|\n)*\.log"
    )
    with pytest.raises(WeightSyncError, match=expected):
        WeightSync(torch_actor, vocab_size=96).publish(make_policy(1), 3)
    assert time.monotonic() - start < 4
    assert torch_actor.policy_version == 0
    with pytest.raises(EngineError, match=r"while generating 8 completions with version 0: no answer within 5 s"):
        torch_actor.generate(prompts, PARAMS, list(range(8)))


@pytest.mark.stack
def test_an_engine_that_cannot_start_says_why(ray_cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine-0 failed while starting: CheckpointError: .*no config\.json"):
        start_engine(TORCH, tmp_path, tmp_path / "engine-0.log")


@pytest.mark.stack
def test_two_actors_share_the_prompts_in_order(
    ray_cluster: Path, checkpoint_dir: Path, make_policy: MakePolicy, prompts: list[list[int]], tmp_path: Path
) -> None:
    pool = start_engines(TORCH.model_copy(update={"num_engines": 2}), checkpoint_dir, tmp_path)
    assert isinstance(pool, EnginePool)
    assert WeightSync(pool, vocab_size=96).publish(make_policy(1), 5).probe_gap_max < 1e-5
    alone = TorchEngine(make_policy(1))
    seeds = list(range(7))
    completions = pool.generate(prompts[:7], PARAMS, seeds)
    assert [c.token_ids for c in completions] == [c.token_ids for c in alone.generate(prompts[:7], PARAMS, seeds)]
    assert {c.policy_version for c in completions} == {5} == {pool.policy_version}
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["engine-0.log", "engine-1.log"]
    pool.close()


def test_a_pool_splits_and_joins_in_order(make_policy: MakePolicy, prompts: list[list[int]]) -> None:
    pool = EnginePool([TorchEngine(make_policy(0), name=f"engine-{i}") for i in range(3)])
    alone = TorchEngine(make_policy(0))
    for count in (0, 1, 2, 8):
        seeds = list(range(count))
        expected = [c.token_ids for c in alone.generate(prompts[:count], PARAMS, seeds)]
        assert [c.token_ids for c in pool.generate(prompts[:count], PARAMS, seeds)] == expected
    pool.close()


DRIVER = """
import os, signal, sys, time
from pathlib import Path
import ray
from rollout.cluster import EngineConfig, running_engines
from rollout.engine import SamplingParams

checkpoint_dir, log_dir = map(Path, sys.argv[1:])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
asked_to_stop = lambda number, frame: None
signal.signal(signal.SIGTERM, asked_to_stop)

def slow_down(host):
    fast = host.engine.generate
    host.engine.generate = lambda *request: (time.sleep(2), fast(*request))[1]

with running_engines(EngineConfig(kind="torch", max_model_len=64), checkpoint_dir, log_dir, num_cpus=1) as engine:
    assert signal.getsignal(signal.SIGTERM) is asked_to_stop, "Ray took the handler of SIGTERM"
    ray.get(engine.actor.__ray_call__.remote(slow_down))
    print("ready", flush=True)
    try:
        engine.generate([[1, 2, 3]], SamplingParams(max_completion_tokens=4), [0])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    completions = engine.generate([[1, 2, 3]], SamplingParams(max_completion_tokens=4), [0])
    print(len(completions[0].token_ids), flush=True)
"""


@pytest.mark.stack
def test_ctrl_c_reaches_the_learner_alone_and_nothing_else_is_printed(checkpoint_dir: Path, tmp_path: Path) -> None:
    """SIGINT to the whole process group, as a terminal sends it, leaves the engine at work."""
    pytest.importorskip("ray")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(checkpoint_dir), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "ready\n"
        time.sleep(0.5)
        os.killpg(driver.pid, signal.SIGINT)
        output, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert output == "interrupted\n4\n"
    assert driver.returncode == 0
    assert (tmp_path / "engine-0.log").is_file()
    assert (tmp_path / "ray").is_dir()


@pytest.mark.stack
def test_a_cluster_that_runs_is_used_and_left_running(ray_cluster: Path, tmp_path: Path) -> None:
    import ray

    with running_cluster(tmp_path), running_cluster(tmp_path, needed=False):
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert not list(tmp_path.iterdir())


def make_host() -> Callable[[Rank], object]:
    """A host's class that travels to the actors by value."""

    class Host:
        def __init__(self, rank: Rank) -> None:
            self.rank = rank

        def add(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for value in values.values():
                value += self.rank.index  # its own memory, on every rank
            return values

        def meet(self) -> str:
            return self.rank.rendezvous

        def fail(self, index: int) -> None:
            print(f"rank {self.rank.index} of {self.rank.count}", flush=True)
            if self.rank.index == index:
                raise KeyError("what went wrong")
            time.sleep(600)

    return Host


@pytest.mark.stack
def test_ranks_answer_in_order_and_the_one_that_fails_is_named(
    ray_cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "GRACE_S", 0.5)
    group = RankGroup(make_host(), 2, tmp_path, name="rank", start_timeout_s=300.0)
    given = {"half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "mask": torch.tensor([3], dtype=torch.int64)}
    for index, answer in enumerate(group.call("adding", 120.0, "add", given)):
        assert answer.keys() == given.keys()
        for name, value in given.items():
            assert torch.equal(answer[name], value + index)
            assert answer[name].dtype == value.dtype
    assert len(set(group.call("meeting", 120.0, "meet"))) == 1
    with pytest.raises(RankError) as caught:
        group.call("failing", 3600.0, "fail", 1)
    assert isinstance(caught.value.cause, KeyError)
    message = str(caught.value)
    assert message.startswith("rank-1 failed while failing: KeyError: 'what went wrong'\nIts log is ")
    assert str(tmp_path / "rank-1.log") in message
    assert "rank 1 of 2" in message
    with pytest.raises(RankError, match="rank-1 failed while failing"):
        group.call("adding", 120.0, "add", given)


@pytest.mark.stack
def test_a_rank_that_hangs_fails_in_time(ray_cluster: Path, tmp_path: Path) -> None:
    group = RankGroup(make_host(), 1, tmp_path, name="rank", start_timeout_s=300.0)
    with pytest.raises(
        RankError, match=r"rank-0 failed while hanging: no answer within 0\.5 s(.|\n)*rank-0\.log"
    ) as caught:
        group.call("hanging", 0.5, "fail", 1)
    assert caught.value.cause is None
    group.close()


def test_an_engine_in_this_process_is_a_single_one() -> None:
    assert EngineConfig(kind="torch", placement="in_process").num_engines == 1
    with pytest.raises(ValidationError, match="holds one engine"):
        EngineConfig(kind="torch", placement="in_process", num_engines=2)
    with pytest.raises(ValidationError, match="needs placement='ray'"):
        EngineConfig(kind="vllm", placement="in_process")
    with pytest.raises(ValidationError, match="gpu_count"):
        EngineConfig(gpu_count=1)  # type: ignore[call-arg]


def test_every_setting_is_described() -> None:
    assert [name for name, field in EngineConfig.model_fields.items() if not field.description] == []


def test_last_lines_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    assert last_lines(path) == []
    path.write_text("".join(f"line {i}\n" for i in range(50)))
    assert last_lines(path, 2) == ["line 48", "line 49"]
