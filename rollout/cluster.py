"""Engines in processes of their own, placed by Ray, whose calls end in time and say why when they fail.

The only module that imports ray, and only when a function needs it.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


# --- weights on their way through the object store -------------------------------------------------------------------

PackedWeights = dict[str, "tuple[np.ndarray, str]"]


def _pack(weights: Mapping[str, Tensor]) -> PackedWeights:
    """Arrays that Ray shares without copying; NumPy has no bfloat16, so those travel as 16-bit integers."""
    import torch

    def array(weight: Tensor) -> tuple[np.ndarray, str]:
        weight = weight.detach().cpu().contiguous()
        kind = str(weight.dtype).removeprefix("torch.")
        return (weight.view(torch.int16) if kind == "bfloat16" else weight).numpy(), kind

    return {name: array(weight) for name, weight in weights.items()}


def _unpack(packed: PackedWeights) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(values).view(getattr(torch, kind)) for name, (values, kind) in packed.items()}


# --- one engine in an actor ------------------------------------------------------------------------------------------


class _EngineHost:
    """What runs in the actor: an engine whose terminal is a log file."""

    engine: Engine

    def __init__(self, log_path: str) -> None:
        import signal
        import warnings

        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        # Ctrl-C stops the learner, which saves and then closes the engine.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def start(self, config: EngineConfig, checkpoint_dir: str, name: str, seed: int) -> None:
        import torch

        torch.set_num_threads(config.num_threads)
        self.engine = build_engine(config, Path(checkpoint_dir), name=name, seed=seed)

    def generate(self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[Completion]:
        return self.engine.generate(prompts, params, seeds)

    def load_weights(self, packed: PackedWeights, version: int) -> None:
        self.engine.load_weights(_unpack(packed), version)


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
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(config.num_threads)}
        if _cluster_folders is not None:
            environment["TMPDIR"] = str(_cluster_folders[0])  # what vLLM leaves in it goes with the cluster
        options = {
            # Threads are bounded by num_threads; Ray's bookkeeping of CPUs would only make an actor wait.
            "num_cpus": 0,
            "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0,
            "runtime_env": {"env_vars": environment},
        }
        self.actor: Any = ray.remote(_EngineHost).options(**options).remote(str(self.log_path))
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
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout_s)
        except GetTimeoutError as error:
            raise self._error(doing, f"no answer within {timeout_s:g} s") from error
        except RayTaskError as error:
            cause = error.cause
            raise self._error(doing, f"{type(cause).__name__}: {cause}") from error
        except RayError as error:
            raise self._error(doing, f"its process died: {_death(error)}") from error

    def _error(self, doing: str, cause: str) -> EngineError:
        lines = last_lines(self.log_path)
        shown = "\n  ".join(["Its last lines:", *lines]) if lines else "It is empty."
        return EngineError(f"{self.name} failed while {doing}: {cause}\nIts log is {self.log_path}. {shown}")


class SharedWeights:
    """Weights put into Ray's object store once, for any number of engines."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        import ray

        self.ref = ray.put(_pack(weights))


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
    if config.placement == "ray":
        start_cluster(num_cpus or os.cpu_count() or 1, log_dir)
    try:
        engine = start_engines(config, checkpoint_dir, log_dir, seed=seed)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        stop_cluster()


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
