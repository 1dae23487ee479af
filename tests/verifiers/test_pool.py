"""The pool of real worker processes: order, deadlines, crashes, hostile plug-ins, and that nothing is left behind.

One long file, since all tests share the plug-in that misbehaves on demand.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from rollout.records import Task
from verifiers import GoldAudit, VerifierLookupError
from verifiers.pool import ScorePool, ScorePoolError, VerifierSpec
from verifiers.slot import Slot

TIMEOUT_S = 1.0
REPO = Path(__file__).resolve().parents[2]
PLUGIN = """
import json, os, re, resource, signal, subprocess, sys, threading, time
from dataclasses import dataclass
from verifiers import GoldAudit, Verdict
print("imported", file=sys.stderr)

class Unprintable(Exception):
    def __str__(self): raise RuntimeError("no")

def act(completion, task):
    if completion == "loop":
        while True: pass
    if completion == "regex":  # holds the interpreter lock, deaf to every Python signal handler
        re.fullmatch(r"(a+)+b", "a" * 60)
    if completion == "raise": raise KeyError("gone")
    if completion == "unprintable": raise Unprintable()
    if completion == "exit": os._exit(7)
    if completion == "sys.exit": sys.exit(3)
    if completion == "segv": os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory":
        hoard = []
        while True: hoard.append(bytearray(1_000_000_000))
    if completion == "recurse": return act_again(completion, task)
    if completion == "nan": return float("nan")
    if completion == "none": return None
    if completion == "print":
        print("x" * 100_000); print("noise", file=sys.stderr); os.write(1, b"raw")
    if completion == "fork" and os.fork() == 0: return 0.0
    if completion == "close": os.closerange(3, 4096)
    if completion == "garbage": [write(fd) for fd in range(3, 4096)]
    if completion == "child": os.posix_spawn("/bin/sleep", ["sleep", "987"], {}); time.sleep(60)
    if completion == "nap": time.sleep(0.4)
    if completion == "pid": return Verdict(score=1.0, status="correct", reason=str(os.getpid()))
    if completion == "daemon": daemon(); time.sleep(60)
    if completion == "orphan": daemon(); os._exit(5)
    if completion == "grow": hoard_for_good.append(bytearray(b"x" * 60_000_000))
    if completion == "limits": return Verdict(score=1.0, status="correct", reason=str(resource.getrlimit(resource.RLIMIT_AS)))
    if completion == "late": uninterrupted_until(time.monotonic() + 0.3)
    if completion == "parts": return Verdict(score=1.0, status="correct", reason="", parts={str(i): 1.0 for i in range(2000)})
    if completion == "sum": return float(task.answer + sum(task.metadata["terms"]) + len(task.prompt))
    return 1.0

def act_again(completion, task): return act_again(completion, task)

hoard_for_good = []

def daemon():  # a session of its own, and no living parent
    child = subprocess.Popen(["sh", "-c", "setsid sleep 986 & setsid sleep 986 &"])
    child.wait()

def uninterrupted_until(end):
    while time.monotonic() < end: pass

@dataclass(frozen=True)
class Slow:
    seconds: float = 0.0
    timeout_s: float = 1.5
    def __call__(self, completion, task):
        time.sleep(float(completion)); return True
    def prepare(self, task):
        if task.answer == "loop": time.sleep(60)
        if task.answer == "exit": os._exit(3)
        if task.answer == "none": return None
        return GoldAudit(status="ambiguous", reason="r", parsed=str(task.answer))

async def waits(completion, task):
    import asyncio
    await asyncio.sleep(0.01)
    return completion == task.answer

def write(fd):
    try: os.write(fd, b"\\x00\\x00\\x00\\x05hello")
    except OSError: pass
"""


def tasks(count, answer=1, metadata=None):
    return [Task(task_id="t", prompt="q", answer=answer, metadata=metadata or {})] * count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A current directory with a plug-in module in it, absent from the import path."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "pool_plugin.py").write_text(PLUGIN)
    (folder / "json.py").write_text("raise RuntimeError('a file beside the user must not shadow the library')\n")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def make(folder, verifier="pool_plugin:act", spec=None, **options):
    assert Path.cwd() == folder
    return ScorePool(
        [VerifierSpec("v", verifier, **(spec or {}))], **{"num_workers": 1, "timeout_s": TIMEOUT_S, **options}
    )


@pytest.fixture(scope="module")
def pool(folder):
    with make(folder, memory_limit_mb=256) as pool:
        yield pool


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def test_built_ins_keep_their_order_with_parts_and_time():
    count = 500
    completions = [f"<think>t</think><answer>{i % 7}</answer>" for i in range(count)]
    golds = [Task(task_id="t", prompt="", answer=i % 5, metadata={}) for i in range(count)]
    with ScorePool([VerifierSpec("accuracy", "numeric"), VerifierSpec("format", "format", 0.2)]) as pool:
        verdicts = pool.score(completions, golds)
        assert pool.score([], []) == []
        assert pool.counters == {"scored": count, "error": 0, "timeout": 0, "worker_restarts": 0, "worker_recycles": 0}
    for i, verdict in enumerate(verdicts):
        right = i % 7 == i % 5
        assert verdict.status == ("correct" if right else "wrong")
        assert verdict.extracted == str(i % 7)
        assert verdict.parts == {"accuracy": float(right), "format": 1.0}
        assert verdict.score == pytest.approx(1.2 if right else 0.2)
        assert 0 < verdict.elapsed_s < TIMEOUT_S


@pytest.mark.parametrize(
    ("bad", "status", "reason", "restarts"),
    [
        ("loop", "timeout", "no verdict within 1 s", 1),
        ("regex", "timeout", "no verdict within 1 s", 1),
        ("raise", "error", "KeyError: 'gone' (pool_plugin.py:", 0),
        ("unprintable", "error", "Unprintable: <its message raised RuntimeError>", 0),
        ("exit", "error", "died on this sample: exit status 7", 1),
        ("sys.exit", "error", "SystemExit: 3", 0),
        ("segv", "error", "died on this sample: killed by SIGSEGV", 1),
        ("memory", "error", "out of memory: MemoryError", 1),
        ("recurse", "error", "RecursionError", 0),
        ("nan", "error", "returned a score that is not finite", 0),
        ("none", "error", "returned NoneType, not a Verdict, bool or float", 0),
        ("close", "error", "died on this sample", 1),
        ("garbage", "error", "died on this sample: ", 1),
    ],
)
def test_one_bad_sample_spares_its_neighbours(pool, bad, status, reason, restarts):
    before = pool.counters
    completions = ["ok"] * 20
    completions[9] = bad
    start = time.perf_counter()
    verdicts = pool.score(completions, tasks(20))
    assert time.perf_counter() - start < TIMEOUT_S + 4.0
    assert [verdict.status for verdict in verdicts] == ["correct"] * 9 + [status] + ["correct"] * 10
    assert verdicts[9].score == 0.0
    assert reason in verdicts[9].reason
    if status == "timeout":
        assert TIMEOUT_S <= verdicts[9].elapsed_s < TIMEOUT_S + 2.0
    counted = {name: count - before[name] for name, count in pool.counters.items()}
    assert counted == {
        "scored": 20,
        "error": 0,
        "timeout": 0,
        "worker_restarts": restarts,
        "worker_recycles": 0,
        status: 1,
    }


def test_a_chunk_may_take_longer_than_one_deadline(pool):
    verdicts = pool.score(["nap"] * 4, tasks(4))
    assert [verdict.status for verdict in verdicts] == ["correct"] * 4
    assert all(0.4 <= verdict.elapsed_s < TIMEOUT_S for verdict in verdicts)


def test_many_bad_samples_in_one_chunk(folder):
    completions = ["exit", "ok", "exit", "exit", "raise", "ok", "segv"] * 4 + ["ok"] * 300
    with make(folder) as pool:
        statuses = [verdict.status for verdict in pool.score(completions, tasks(len(completions)))]
    assert statuses == ["error", "correct", "error", "error", "error", "correct", "error"] * 4 + ["correct"] * 300


def test_tasks_travel_whole_and_unsendable_ones_are_errors(pool):
    verdicts = pool.score(
        ["sum", "sum", "ok"],
        [
            Task(task_id="t", prompt="q", answer=Fraction(1, 2), metadata={"terms": (1, 2)}),
            Task(task_id="t", prompt="q", answer=lambda: 0, metadata={}),
            Task(task_id="t", prompt="q", answer=None, metadata={}),
        ],
    )
    assert verdicts[0].score == 4.5
    assert verdicts[1].status == "error"
    assert "can't be sent to a worker" in verdicts[1].reason
    assert verdicts[2].status == "correct"


def test_printing_and_forking_verifiers_leave_protocol_and_screen_alone(folder, capfd):
    log = folder / "workers.log"
    with make(folder, log_path=log) as pool:
        verdicts = pool.score(["print", "fork", "print", "ok"], tasks(4))
    assert [verdict.score for verdict in verdicts] == [1.0] * 4
    assert capfd.readouterr() == ("", "")
    text = log.read_text()
    assert text.count("noise") == 2
    assert "x" * 100_000 in text


def test_lone_surrogates_and_megabytes_pass_through(pool):
    with ScorePool([VerifierSpec("n", "numeric")], num_workers=1) as numbers:
        verdicts = numbers.score(["<answer>\ud800</answer>", "x" * 3_000_000, "<answer>1</answer>"], tasks(3))
    assert [verdict.status for verdict in verdicts] == ["unparsable", "unparsable", "correct"]
    assert verdicts[0].extracted == "\ud800"


def test_workers_are_recycled_and_idle_deaths_blame_nobody(folder):
    with make(folder, recycle_after=3) as pool:
        pids = {pool.score(["pid"], tasks(1))[0].reason for _ in range(7)}
        assert len(pids) == 3
        assert pool.counters["worker_recycles"] == 2
        (pid,) = pool.worker_pids
        os.kill(pid, signal.SIGKILL)
        wait_gone([pid])
        assert pool.score(["ok"], tasks(1))[0].status == "correct"
        assert pool.counters["worker_restarts"] == 1


def test_a_killed_sample_takes_its_own_children_with_it(folder):
    with make(folder) as pool:
        (group,) = pool.worker_pids
        assert pool.score(["child"], tasks(1))[0].status == "timeout"
        members = [stat for stat in Path("/proc").glob("[0-9]*/stat") if process_group(stat) == group]
    assert not [stat for stat in members if alive(stat.parent.name)]


def process_group(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[2])
    except OSError:
        return None


def test_any_thread_may_score(pool):
    def one(seed):
        completions = ["raise" if (i + seed) % 5 == 0 else "ok" for i in range(60)]
        return [v.status for v in pool.score(completions, tasks(60))] == [
            "error" if c == "raise" else "correct" for c in completions
        ]

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(one, range(12)))


def test_closing_twice_and_while_scoring(folder):
    pool = make(folder, timeout_s=60.0)
    raised = []

    def score():
        try:
            pool.score(["loop"], tasks(1))
        except ScorePoolError as exc:
            raised.append(str(exc))

    thread = threading.Thread(target=score)
    thread.start()
    time.sleep(0.2)
    pids = pool.worker_pids
    start = time.perf_counter()
    pool.close()
    thread.join(timeout=5)
    assert time.perf_counter() - start < 2
    assert raised == ["the ScorePool was closed while it was scoring"]
    assert len(pids) == 1
    assert wait_gone(pids) == []
    pool.close()
    with pytest.raises(ScorePoolError, match="closed"):
        pool.score(["ok"], tasks(1))


def test_a_worker_that_can_not_be_replaced_ends_the_pool_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "pool_vanishing.py"
    plugin.write_text("import os\ndef f(completion, task): os._exit(1)\n")
    with ScorePool([VerifierSpec("v", "pool_vanishing:f")], num_workers=1, timeout_s=1.0) as pool:
        plugin.unlink()
        with pytest.raises(VerifierLookupError, match="No module named 'pool_vanishing'"):
            pool.score(["a"] * 4, tasks(4))
        with pytest.raises(VerifierLookupError, match="No module named 'pool_vanishing'"):
            pool.score(["a"], tasks(1))


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("numric", "did you mean 'numeric'"),
        ("no_such_module:f", "'no_such_module' failed with ModuleNotFoundError"),
        ("pool_plugin:actt", "did you mean 'act'"),
    ],
)
def test_an_unresolvable_verifier_fails_in_the_constructor(folder, verifier, message):
    before = threading.active_count()
    with pytest.raises(VerifierLookupError, match=message):
        make(folder, verifier, num_workers=2)
    assert threading.active_count() == before


def test_a_worker_that_does_not_come_up_fails_in_the_constructor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool_stuck.py").write_text("while True: pass\n")
    (tmp_path / "pool_dying.py").write_text("import os; os._exit(9)\n")
    (tmp_path / "pool_greedy.py").write_text("x = bytearray(2**30)\n")
    for module, seconds, message in (
        ("pool_stuck", 0.5, "not ready after 0.5 s; pass log_path"),
        ("pool_dying", 60.0, "exit status 9 before it was ready"),
        ("pool_greedy", 60.0, "MemoryError|out of memory"),
    ):
        with pytest.raises((ScorePoolError, VerifierLookupError), match=message):
            ScorePool([VerifierSpec("v", f"{module}:f")], 1, memory_limit_mb=256, startup_timeout_s=seconds)


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([], {}, "at least one VerifierSpec"),
        ([VerifierSpec("a", "numeric"), VerifierSpec("a", "format")], {}, "two verifiers of the pool are named 'a'"),
        ([VerifierSpec("a", "numeric", float("inf"))], {}, "the weight of verifier 'a' is inf"),
        ([VerifierSpec("a", "numeric")], {"num_workers": 0}, "num_workers is 0"),
        ([VerifierSpec("a", "numeric")], {"timeout_s": 0.0}, "timeout_s is 0.0"),
        ([VerifierSpec("a", "numeric")], {"timeout_s": float("nan")}, "timeout_s is nan"),
        ([VerifierSpec("a", "numeric")], {"memory_limit_mb": 1}, "memory_limit_mb is 1"),
    ],
)
def test_bad_arguments_are_refused(specs, options, message):
    with pytest.raises(ValueError, match=message):
        ScorePool(specs, **options)


def test_bad_calls_are_refused(pool):
    with pytest.raises(ValueError, match="2 completions but 1 tasks"):
        pool.score(["a", "b"], tasks(1))
    with pytest.raises(TypeError, match="completion 1 is NoneType"):
        pool.score(["a", None], tasks(2))


PARENT = """
import sys, threading
from rollout.records import Task
from verifiers.pool import ScorePool, VerifierSpec
pool = ScorePool([VerifierSpec("v", "pool_plugin:act")], num_workers=2, timeout_s=300.0)
bad = [Task(task_id="t", prompt="", answer=1, metadata={})]
threading.Thread(target=pool.score, args=(["regex"], bad)).start()
print(*pool.worker_pids, flush=True)
threading.Event().wait()
"""


def test_no_worker_outlives_a_killed_parent_even_one_that_never_returns(folder):
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdout=subprocess.PIPE, cwd=folder, env=env)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.3)
    assert [alive(pid) for pid in pids] == [True, True]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_gone(pids) == []


def test_workers_import_nothing_heavy():
    code = (
        "import sys, verifiers.worker; print(*sorted({'torch', 'numpy', 'ray', 'vllm', 'pydantic'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def sleepers():
    """Processes `sleep 986`, as this file starts them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == b"sleep\x00986\x00":
                found.append(int(path.parent.name))
        except OSError:
            pass
    return [pid for pid in found if alive(pid)]


@pytest.mark.parametrize(("completion", "status"), [("daemon", "timeout"), ("orphan", "error")])
def test_what_left_its_group_and_lost_its_parent_dies_too(folder, completion, status):
    others = set(sleepers())
    with make(folder) as pool:
        assert pool.score([completion, "ok"], tasks(2))[0].status == status
        assert wait_gone(set(sleepers()) - others, 2.0) == []


def test_a_verifier_may_ask_for_more_time_than_the_pool_gives(folder):
    with make(folder, "pool_plugin:Slow", timeout_s=0.3) as pool:
        verdicts = pool.score(["0.6", "0", "9"], tasks(3))
        assert [verdict.status for verdict in verdicts] == ["correct", "correct", "timeout"]
        assert verdicts[2].reason == "no verdict within 1.5 s; the worker was killed"
        assert 1.5 <= verdicts[2].elapsed_s < 3.0
    with make(folder, "pool_plugin:Slow", {"options": {"timeout_s": 0.4}}, timeout_s=0.3) as pool:
        assert pool.score(["0.9"], tasks(1))[0].status == "timeout"
    with make(folder, "pool_plugin:Slow", {"timeout_s": 5.0}, timeout_s=0.3) as pool:
        assert pool.score(["1.8"], tasks(1))[0].status == "correct"


def test_a_verdict_after_the_deadline_is_a_timeout_even_if_the_parent_was_busy(folder, monkeypatch):
    with make(folder, timeout_s=0.2) as pool:
        receive = Slot._receive
        monkeypatch.setattr(Slot, "_receive", lambda self, worker, seconds: receive(self, worker, seconds + 5.0))
        (verdict,) = pool.score(["late"], tasks(1))
    assert (verdict.status, verdict.score) == ("timeout", 0.0)
    assert verdict.elapsed_s >= 0.3


def test_memory_limit_is_soft_and_growth_recycles(folder):
    with make(folder, memory_limit_mb=700, max_growth_mb=150) as pool:
        limits = pool.score(["limits"], tasks(1))[0].reason
        assert limits == str((700 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
        verdicts = pool.score(["grow"] * 10, tasks(10))
        assert [verdict.status for verdict in verdicts] == ["correct"] * 10
        health = pool.health
    assert (health.recycles, health.restarts) == ({"memory growth": 3}, {})


def test_health_counts_and_names_the_causes(folder):
    with make(folder) as pool:
        pool.score(["ok", "nap", "exit", "segv", "raise", "loop", "ok"], tasks(7))
        health = pool.health
    assert (health.queued, health.running) == (0, 0)
    assert health.statuses == {"correct": 3, "wrong": 0, "unparsable": 0, "timeout": 1, "error": 3}
    assert health.restarts == {"exit status 7": 1, "killed by SIGSEGV": 1, "timeout": 1}
    assert [call.completion for call in health.slowest[:2]] == ["loop", "nap"]
    assert health.slowest[0].status == "timeout"
    assert sorted((call.elapsed_s for call in health.slowest), reverse=True) == [c.elapsed_s for c in health.slowest]


def test_health_of_a_busy_pool_and_progress_in_the_callers_thread(folder):
    seen, threads = [], set()
    with make(folder) as pool:

        def progress(done, total):
            threads.add(threading.current_thread())
            seen.append((done, total, pool.health.queued + pool.health.running))

        pool.score(["nap"] * 4, tasks(4), progress)
        assert pool.prepare([], progress) == []
    assert threads == {threading.current_thread()}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (4, 4, 0)
    assert len(seen) > 1
    assert all(done + left <= total for done, total, left in seen)  # some may have ended between the two


def test_only_a_few_chunks_are_pickled_ahead(folder):
    pickled = []

    class Counted:
        prompt, answer, metadata = "q", 1, {}

        def __reduce__(self):
            pickled.append(1)
            return int, ()

    golds = tasks(2000, metadata={"x": Counted()})
    with make(folder, timeout_s=60.0) as pool:

        def score():
            with pytest.raises(ScorePoolError, match="closed"):
                pool.score(["loop"] * 2000, golds)

        thread = threading.Thread(target=score)
        thread.start()
        time.sleep(0.5)
        assert 0 < len(pickled) <= 64 * 19
        pool.close()
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_golds_are_audited_with_the_same_care(folder):
    golds = [Task(task_id="t", prompt="", answer=answer, metadata={}) for answer in (1, "loop", "exit", "none", 2)]
    with make(folder, "pool_plugin:Slow", {"options": {"timeout_s": 0.5}}, timeout_s=0.5) as pool:
        audits = pool.prepare(golds)
        assert pool.health.statuses == dict.fromkeys(["correct", "wrong", "unparsable", "timeout", "error"], 0)
    assert audits[0] == GoldAudit(status="ambiguous", reason="r", parsed="1")
    reasons = [audit.reason for audit in audits if audit is not None]
    assert reasons[1] == "the verifier failed on it: no verdict within 0.5 s; the worker was killed"
    assert reasons[2] == "the verifier failed on it: the worker died on this sample: exit status 3"
    assert [audit and audit.status for audit in audits] == ["ambiguous", "unparsable", "unparsable", None, "ambiguous"]


def test_async_verifiers_and_options_reach_the_workers(folder):
    with make(folder, "pool_plugin:waits") as pool:
        assert [v.score for v in pool.score(["1", "2"], tasks(2, answer="1"))] == [1.0, 0.0]
    with pytest.raises(VerifierLookupError, match="no option 'second', did you mean 'seconds'"):
        make(folder, "pool_plugin:Slow", {"options": {"second": 1}})
    with pytest.raises(ValueError, match="options of verifier 'v' must be plain JSON"):
        make(folder, "pool_plugin:Slow", {"options": {"seconds": {1}}})


def test_each_task_picks_its_verifier(folder):
    spec = VerifierSpec("v", "by_task", options={"verifiers": ["numeric", "format"]})
    names = ["numeric", "format", "math", ""]
    golds = [Task(task_id="t", prompt="", answer=5, verifier=name) for name in names]
    with ScorePool([spec], num_workers=1) as pool:
        verdicts = pool.score(["<answer>5</answer>"] * 4, golds)
    assert [verdict.status for verdict in verdicts] == ["correct", "wrong", "error", "error"]


def test_too_many_parts_are_refused(pool):
    verdict = pool.score(["parts"], tasks(1))[0]
    assert (verdict.status, verdict.reason) == ("error", "the verdict has 2001 parts, more than 1000")


CHILD = """
import sys
from rollout.records import Task
from verifiers.pool import ScorePool, VerifierSpec
def score(answer):
    with ScorePool([VerifierSpec("v", "numeric")], num_workers=1) as pool:
        task = Task(task_id="t", prompt="", answer=answer, metadata={})
        return [v.status for v in pool.score(["<answer>1</answer>", "<answer>2</answer>"], [task, task])]
"""


def test_pools_work_in_child_processes(tmp_path, monkeypatch):
    (tmp_path / "pool_in_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    import pool_in_child

    with multiprocessing.get_context("spawn").Pool(2) as processes:
        assert processes.map(pool_in_child.score, [1, 2]) == [["correct", "wrong"], ["wrong", "correct"]]


@pytest.mark.stack
def test_a_pool_works_inside_a_ray_actor(tmp_path):
    ray = pytest.importorskip("ray")
    env = {"env_vars": {"PYTHONPATH": str(REPO)}}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=env)
    try:

        @ray.remote(max_concurrency=2)
        class Scorer:
            def __init__(self):
                self.pool = ScorePool([VerifierSpec("v", "numeric")], num_workers=1, timeout_s=5.0)

            def score(self, completions, answer):
                task = Task(task_id="t", prompt="", answer=answer, metadata={})
                return [v.status for v in self.pool.score(completions, [task] * len(completions))]

        scorer = Scorer.remote()
        texts = [f"<answer>{i % 3}</answer>" for i in range(60)]
        calls = [scorer.score.remote(texts, answer) for answer in (0, 1, 2, 3)]
        for answer, statuses in enumerate(ray.get(calls)):
            assert statuses == ["correct" if i % 3 == answer else "wrong" for i in range(60)]
    finally:
        ray.shutdown()
