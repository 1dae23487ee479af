"""Engines and ranks in processes of their own, placed by Ray, whose calls end in time and say why when they fail.

The only module that imports ray, and only when a function needs it; over 400 lines, because all that does so is here.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.engine import Completion, Engine, SamplingParams
from rollout.engine_checks import EngineError
from rollout.engine_config import EngineConfig, build_engine

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


# --- the cluster -----------------------------------------------------------------------------------------------------

_cluster_folders: tuple[Path, Path] | None = None  # Ray's temporary folder, and where its logs go at the end


def start_cluster(num_cpus: int, log_dir: Path) -> None:
    """Start a Ray node of this program alone, silent on the terminal; call it from the main thread.

    Its folder is temporary and its ports are free ones, so runs side by side don't meet. Its processes end with this
    one, and the terminal's Ctrl-C does not reach them. Its logs move to `<log_dir>/ray` when it stops.
    """
    global _cluster_folders
    if _cluster_folders is not None:
        raise EngineError("the Ray cluster of this process is already running: stop it first")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts its workers at nice 15, and any other program on the machine would then take the engines' cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    temporary = Path(tempfile.mkdtemp(prefix="gz-"))  # short: Ray puts sockets in it, whose paths have 107 bytes
    _cluster_folders = (temporary, log_dir)
    atexit.register(stop_cluster)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temporary),
        )
    except Exception as error:  # Ray raises many kinds here; each means that there is no cluster
        stop_cluster()
        raise EngineError(f"Ray did not start: {_first_line(error)}. Its logs: {log_dir / 'ray'}") from error
    finally:
        # Ray takes SIGTERM for itself; a run that is asked to stop wants to save first.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def stop_cluster() -> None:
    """End every Ray process of this program and keep its logs; nothing happens when none runs."""
    global _cluster_folders
    if _cluster_folders is None:
        return
    import ray

    temporary, log_dir = _cluster_folders
    _cluster_folders = None
    atexit.unregister(stop_cluster)
    ray.shutdown()
    try:
        for logs in temporary.glob("session_2*/logs"):
            shutil.copytree(logs, log_dir / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
    except OSError as error:  # logs must not hide why the run ends, a full disk for instance
        logging.getLogger(__name__).warning("Ray's logs were not kept in %s: %s", log_dir / "ray", _first_line(error))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def running_cluster(log_dir: Path, *, needed: bool = True, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray node within the block, where one is `needed` and none of this program runs yet."""
    if not needed or _cluster_folders is not None:
        yield
        return
    start_cluster(num_cpus or os.cpu_count() or 1, log_dir)
    try:
        yield
    finally:
        stop_cluster()


# --- tensors on their way through the object store -------------------------------------------------------------------

PackedTensor = tuple["np.ndarray", str]


def _as_array(tensor: Tensor) -> PackedTensor:
    """An array that Ray shares without copying; NumPy has no bfloat16, so that travels as 16-bit integers."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    kind = str(tensor.dtype).removeprefix("torch.")
    return (tensor.view(torch.int16) if kind == "bfloat16" else tensor).numpy(), kind


def _as_tensor(packed: PackedTensor) -> Tensor:
    """The tensor of `_as_array`, on the same memory: it is to be read only."""
    import torch

    values, kind = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values).view(getattr(torch, kind))


def _own_tensor(packed: PackedTensor) -> Tensor:
    return _as_tensor(packed).clone()


def _send_tensors_as_arrays() -> None:
    """Let tensors in this process's arguments and results travel as arrays: several times faster than torch's pickling."""
    import torch
    from ray.util import register_serializer

    register_serializer(torch.Tensor, serializer=_as_array, deserializer=_own_tensor)


# --- a process of one actor -----------------------------------------------------------------------------------------


def _write_into(log_path: str) -> None:
    """Make a log file the terminal of this process."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Ctrl-C reaches the program that started this process: it saves and then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start_actor(host: type, log_path: Path, *, num_threads: int, num_gpus: int) -> Any:
    """An actor of `host`, which is given the log's path, in the running cluster."""
    import ray

    log_path.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(num_threads)}
    if _cluster_folders is not None:
        environment["TMPDIR"] = str(_cluster_folders[0])  # what vLLM leaves in it goes with the cluster
    # Threads are bounded by num_threads; Ray's bookkeeping of CPUs would only make an actor wait.
    options = {"num_cpus": 0, "num_gpus": num_gpus, "runtime_env": {"env_vars": environment}}
    return ray.remote(host).options(**options).remote(str(log_path))


def _cause(error: Exception) -> str:
    """Why a call of an actor failed, from what Ray raised: what the actor raised itself, or how its process ended."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return f"its process died: {_death(error)}"


def _report(name: str, doing: str, cause: str, log_path: Path) -> str:
    lines = last_lines(log_path)
    shown = "\n  ".join(["Its last lines:", *lines]) if lines else "It is empty."
    return f"{name} failed while {doing}: {cause}\nIts log is {log_path}. {shown}"


# --- one engine in an actor ------------------------------------------------------------------------------------------


class _EngineHost:
    """What runs in the actor: an engine whose terminal is a log file."""

    engine: Engine

    def __init__(self, log_path: str) -> None:
        _write_into(log_path)

    def start(self, config: EngineConfig, checkpoint_dir: str, name: str, seed: int) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self.engine = build_engine(config, Path(checkpoint_dir), name=name, seed=seed)

    def generate(self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[Completion]:
        return self.engine.generate(prompts, params, seeds)

    def load_weights(self, packed: dict[str, PackedTensor], version: int) -> None:
        self.engine.load_weights({name: _as_tensor(weight) for name, weight in packed.items()}, version)


class RayEngine:
    """An engine in a Ray actor; a call that fails, hangs or loses its actor raises EngineError with the cause."""

    def __init__(self, config: EngineConfig, checkpoint_dir: Path, log_path: Path, *, name: str, seed: int) -> None:
        import ray

        if not ray.is_initialized():
            raise EngineError(f"{name} needs a Ray cluster: call start_cluster first")
        self.name = name
        self.policy_version = 0
        self.config = config
        self.log_path = log_path.absolute()
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self.actor: Any = _start_actor(_EngineHost, self.log_path, num_threads=config.num_threads, num_gpus=num_gpus)
        arguments = (config, str(Path(checkpoint_dir).absolute()), name, seed)
        try:
            self._call("starting", config.start_timeout_s, "start", *arguments)
        except EngineError:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; EngineError after generate_timeout_s."""
        rows = [list(prompt) for prompt in prompts]
        doing = f"generating {len(rows)} completions with version {self.policy_version}"
        return self._call(doing, self.config.generate_timeout_s, "generate", rows, params, list(seeds))

    def load_weights(self, weights: Mapping[str, Tensor] | SharedWeights, version: int) -> None:
        """Replace all weights and take `version`; EngineError after sync_timeout_s."""
        shared = weights if isinstance(weights, SharedWeights) else SharedWeights(weights)
        doing = f"loading the weights of version {version}"
        self._call(doing, self.config.sync_timeout_s, "load_weights", shared.ref, version)
        self.policy_version = version

    def close(self) -> None:
        """End the actor's process."""
        import ray

        if ray.is_initialized():
            ray.kill(self.actor)

    def _call(self, doing: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except GetTimeoutError as error:
            cause = f"no answer within {timeout_s:g} s"
            raise EngineError(_report(self.name, doing, cause, self.log_path)) from error
        except RayError as error:
            raise EngineError(_report(self.name, doing, _cause(error), self.log_path)) from error


class SharedWeights:
    """Weights put into Ray's object store once, for any number of engines."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        import ray

        self.ref = ray.put({name: _as_array(weight) for name, weight in weights.items()})


def start_engine(
    config: EngineConfig, checkpoint_dir: Path, log_path: Path, *, name: str = "engine-0", seed: int = 0
) -> RayEngine:
    """Start one engine in an actor of the running cluster; its output goes to `log_path`."""
    return RayEngine(config, checkpoint_dir, log_path, name=name, seed=seed)


# --- several engines -------------------------------------------------------------------------------------------------


class EnginePool:
    """Several engines as one: prompts are split over them in order, weights go to all."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        if not engines:
            raise ValueError("a pool needs at least one engine")
        self.name = "+".join(engine.name for engine in engines)
        self.engines = list(engines)
        self.policy_version = min(engine.policy_version for engine in engines)
        self._threads = ThreadPoolExecutor(len(engines), thread_name_prefix="engine-call")

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order; the first engine that fails raises."""
        bounds = [len(prompts) * i // len(self.engines) for i in range(len(self.engines) + 1)]
        calls = [
            self._threads.submit(engine.generate, prompts[start:end], params, seeds[start:end])
            for engine, start, end in zip(self.engines, bounds, bounds[1:], strict=False)
            if end > start
        ]
        return [completion for call in calls for completion in call.result()]

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights of every engine and take `version`; they pass through the object store once."""
        remote = any(isinstance(engine, RayEngine) for engine in self.engines)
        shared = SharedWeights(weights) if remote else None

        def load(engine: Engine) -> None:
            if isinstance(engine, RayEngine) and shared is not None:
                engine.load_weights(shared, version)
            else:
                engine.load_weights(weights, version)

        for call in [self._threads.submit(load, engine) for engine in self.engines]:
            call.result()
        self.policy_version = version

    def close(self) -> None:
        """Close every engine."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for engine in self.engines:
            engine.close()


def start_engines(config: EngineConfig, checkpoint_dir: Path, log_dir: Path, *, seed: int = 0) -> Engine:
    """The engines of `config`, as one; in a running cluster, with logs `<log_dir>/engine-N.log`, unless in_process."""
    if config.placement == "in_process":
        return build_engine(config, checkpoint_dir, seed=seed)

    def start(index: int) -> Engine:
        name = f"engine-{index}"
        return start_engine(config, checkpoint_dir, log_dir / f"{name}.log", name=name, seed=seed + index)

    if config.num_engines == 1:
        return start(0)
    with ThreadPoolExecutor(config.num_engines) as threads:
        return EnginePool(list(threads.map(start, range(config.num_engines))))


@contextmanager
def running_engines(
    config: EngineConfig, checkpoint_dir: Path, log_dir: Path, *, seed: int = 0, num_cpus: int | None = None
) -> Iterator[Engine]:
    """The engines of `config` with the Ray cluster they need; both end with the block."""
    with running_cluster(log_dir, needed=config.placement == "ray", num_cpus=num_cpus):
        engine = start_engines(config, checkpoint_dir, log_dir, seed=seed)
        try:
            yield engine
        finally:
            engine.close()


# --- ranks that compute together --------------------------------------------------------------------------------------

GRACE_S = 30.0  # what the others get to end by themselves, or to be found dead, once one rank has raised an error


class RankError(RuntimeError):
    """A rank of a group failed, died or hung: the message says which, while doing what, why, and where its log is.

    `cause` is what the rank itself raised; None when its process died or gave no answer.
    """

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Rank:
    """One of `count` processes that compute together; `rendezvous` is the URL at which they find each other."""

    index: int
    count: int
    rendezvous: str


class _RankHost:
    """What runs in the actor: whatever `build` makes of this rank."""

    host: Any

    def __init__(self, log_path: str) -> None:
        _write_into(log_path)
        _send_tensors_as_arrays()

    def start(self, build: Callable[[Rank], Any], rank: Rank) -> None:
        self.host = build(rank)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self.host, method)(*arguments)


class RankGroup:
    """`num_ranks` actors that hold one object each, made by `build`, and take every call together.

    `build` and arguments have to pickle. A rank that fails, dies or hangs ends the group, for the others may wait for it:
    all processes are stopped, and further calls raise the same error. Logs are `<log_dir>/<name>-N.log`. Ranks reserve no
    GPU: each may use any.
    """

    def __init__(
        self,
        build: Callable[[Rank], Any],
        num_ranks: int,
        log_dir: Path,
        *,
        name: str,
        num_threads: int = 1,
        start_timeout_s: float = 180.0,
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise RankError(f"{name} needs a Ray cluster: call start_cluster first")
        _send_tensors_as_arrays()
        self.name = name
        self.log_paths = [(log_dir / f"{name}-{index}.log").absolute() for index in range(num_ranks)]
        self._ended: RankError | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=_cluster_folders and _cluster_folders[0]))
        self.actors = [_start_actor(_RankHost, path, num_threads=num_threads, num_gpus=0) for path in self.log_paths]
        ranks = [Rank(index, num_ranks, f"file://{self._folder}/rendezvous") for index in range(num_ranks)]
        calls = [actor.start.remote(build, rank) for actor, rank in zip(self.actors, ranks, strict=True)]
        self._answers(calls, "starting", start_timeout_s)

    def call(self, doing: str, timeout_s: float, method: str, *arguments: Any) -> list[Any]:
        """What `method` returns on every rank, by rank; RankError, after at most `timeout_s` and a short grace."""
        import ray

        if self._ended is not None:
            raise RankError(str(self._ended), self._ended.cause)
        shared = ray.put(arguments)  # once for all of them
        return self._answers([actor.call.remote(method, shared) for actor in self.actors], doing, timeout_s)

    def close(self) -> None:
        """End the actors' processes."""
        import ray

        self._ended = self._ended or RankError(f"{self.name} was closed")
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self, calls: list[Any], doing: str, timeout_s: float) -> list[Any]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        deadline, waiting = time.monotonic() + timeout_s, list(calls)
        answers: dict[int, Any] = {}
        failed: dict[int, Exception] = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, waiting = ray.wait(waiting, timeout=min(left, 1.0))
            for call in done:
                try:
                    answers[calls.index(call)] = ray.get(call)
                except RayError as error:
                    failed[calls.index(call)] = error
                    died = not isinstance(error, RayTaskError)
                    deadline = min(deadline, time.monotonic() + (0.0 if died else GRACE_S))
        if len(answers) == len(calls):
            return [answers[index] for index in range(len(calls))]
        self._ended = self._error(failed, [calls.index(call) for call in waiting], doing, timeout_s)
        self.close()
        raise self._ended

    def _error(self, failed: Mapping[int, Exception], silent: Sequence[int], doing: str, timeout_s: float) -> RankError:
        """The error of the rank to blame: one that died, for the others only lost their peer, else the first that failed."""
        from ray.exceptions import RayTaskError

        dead = [index for index, error in failed.items() if not isinstance(error, RayTaskError)]
        index = dead[0] if dead else next(iter(failed), silent[0] if silent else 0)
        error = failed.get(index)
        cause = f"no answer within {timeout_s:g} s" if error is None else _cause(error)
        message = _report(f"{self.name}-{index}", doing, cause, self.log_paths[index])
        own = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else None
        raised = RankError(message, own)
        raised.__cause__ = error
        return raised


# --- what went wrong -------------------------------------------------------------------------------------------------


def last_lines(path: Path, count: int = 12) -> list[str]:
    """The last `count` lines of a log; none when there is no file."""
    if not path.is_file():
        return []
    with path.open(errors="replace") as file:
        return [line.rstrip() for line in deque(file, maxlen=count)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _death(error: BaseException) -> str:
    """The part of Ray's account of a dead actor that tells the cause."""
    text = " ".join(str(error).split())
    start = text.find("The actor is dead because")
    return text[start:] if start >= 0 else text
