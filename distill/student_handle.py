"""The student as its run sees it, in this process or spread over ranks: batches in, metrics, weights, checkpoints out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from distill.lora import ADAPTER, add_adapters, has_adapters, merged_weights, write_adapter
from distill.sft import config_of_shape
from distill.student_config import DistillConfig
from distill.student_loss import StudentBatch, StudentLoss
from distill.student_trainer import StudentTrainer
from policy.atomic import CheckpointError, atomic_folder
from policy.checkpoint import hf_state_dict, load_policy, read_config, save_policy
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.interface import Policy
from rollout.checkpoints import LEARNER_STATE
from rollout.errors import UserError
from rollout.weights import PolicySource, WeightSource, policy_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WriteSnapshot = Callable[[Path], None]


class StudentHandle(WeightSource, Protocol):
    """What a run asks of its student, wherever it learns; `close` it at the end.

    `num_bytes` is about the size of a checkpoint. `can_write_in_background`: what `snapshot` returns may run in another
    thread while the student goes on.
    """

    num_bytes: int
    can_write_in_background: bool

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The student's config."""
        ...

    def step(self, batch: StudentBatch, step: int) -> dict[str, float]:
        """As `StudentTrainer.step`."""
        ...

    def snapshot(self) -> WriteSnapshot:
        """Writes the present state into an existing folder: the student's checkpoint and the trainer's own state."""
        ...

    def load_state(self, folder: Path) -> None:
        """Take up the trainer's own state from a checkpoint; the weights were read from it at the start."""
        ...

    def close(self) -> None:
        """Free what it holds beside memory."""
        ...


def first_folder(config: DistillConfig, base: Path | None, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The checkpoint folder of the student before its first step: `base`, or `folder`, written unless it is there.

    It is written for a new student, with weights of the config's seed, and for config_changes: then with links to the
    files of `base` and a config.json of its own. UserError where the changes or the tokenizer do not fit the student.
    """
    if base is not None and not config.student.config_changes:
        folder = base
    elif not (folder / "config.json").exists():
        with atomic_folder(folder) as temporary:
            if base is None:
                save_policy(_new_student(config, tokenizer), temporary)
                tokenizer.save_pretrained(temporary)
            else:
                _link_with_changes(base, config.student.config_changes, temporary)
    vocab_size = read_config(folder).vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the student's vocabulary of {vocab_size}"
        )
    return folder


def _link_with_changes(base: Path, changes: Mapping[str, Any], folder: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    values = json.loads((base / "config.json").read_text()) | dict(changes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    try:
        read_config(folder)
    except CheckpointError as error:
        raise UserError(f"student.config_changes={dict(changes)!r} does not fit {base}: {error}") from error


def _new_student(config: DistillConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    assert config.student.model is not None  # the config's own check
    shape = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "model_type" in config.student.model:  # transformers' default would be a token of another vocabulary
        shape["bos_token_id"] = tokenizer.bos_token_id
    policy_config = config_of_shape(config.student.model | shape)
    model = DensePolicy(policy_config) if isinstance(policy_config, DenseConfig) else DeepseekPolicy(policy_config)
    model.reset_parameters(config.seed)
    return model


def open_student(
    config: DistillConfig,
    first: Path,
    resumed_from: Path | None,
    loss: StudentLoss,
    *,
    num_steps: int,
    bad_batch_path: Path,
    log_dir: Path,
) -> StudentHandle:
    """The student with the weights of `first`, or with all that a checkpoint holds; ranks write logs into `log_dir`."""
    # Adapters are put on the first weights again; every other student is read from its checkpoint.
    folder = first if resumed_from is None or config.lora else resumed_from
    student: StudentHandle
    if not config.trainer.is_spread:
        model = load_policy(folder)
        student = LocalStudent(config, model, loss, num_steps=num_steps, bad_batch_path=bad_batch_path)
    else:
        from distill.student_ranks import LoneStudent, RayStudent, StudentPlan

        plan = StudentPlan(config, folder.absolute(), loss, num_steps, bad_batch_path.absolute())
        student = LoneStudent(plan) if config.trainer.placement == "in_process" else RayStudent(plan, log_dir)
    if resumed_from is not None:
        student.load_state(resumed_from)
        if isinstance(student, LocalStudent) and config.lora:
            _check_merged(student, resumed_from)
    return student


def _check_merged(student: LocalStudent, checkpoint: Path) -> None:
    """CheckpointError where the adapters on the first weights are not the checkpoint's: then those have changed."""
    kept, now = hf_state_dict(load_policy(checkpoint)), student.weights()
    changed = [name for name, weight in kept.items() if not torch.equal(weight, now[name].cpu())]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: its adapters are not for these first weights ({changed[0]} differs). Has student.init changed?"
        )


class LocalStudent(PolicySource):
    """A student in this process, with whole weights in memory; with `[lora]` in the config, its adapters alone learn."""

    can_write_in_background = True

    def __init__(
        self,
        config: DistillConfig,
        model: Policy,
        loss: StudentLoss,
        *,
        num_steps: int,
        bad_batch_path: Path,
    ) -> None:
        if config.lora is not None:
            add_adapters(model, config.lora, config.seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(model.to(device))
        self._config = config
        self.trainer = StudentTrainer(
            self.model,
            config.trainer,
            loss,
            num_steps=num_steps,
            seed=config.seed,
            bad_batch_path=bad_batch_path,
        )
        self.num_bytes = checkpoint_bytes(self.model)

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The student's config."""
        return self.model.config

    def weights(self) -> dict[str, Tensor]:
        """The weights that the student computes with; of adapters, what they make of their layers."""
        if isinstance(self.model, DensePolicy) and has_adapters(self.model):
            return merged_weights(self.model)
        return super().weights()

    def scratch(self) -> Policy:
        """A whole copy without adapters."""
        return policy_of(self.policy_config, self.weights())

    def step(self, batch: StudentBatch, step: int) -> dict[str, float]:
        """As `StudentTrainer.step`."""
        return self.trainer.step(batch, step)

    def snapshot(self) -> WriteSnapshot:
        """Copies weights and state into main memory now, and writes the copies."""
        model, lora = policy_of(self.policy_config, self.weights()), self._config.lora
        state = _copied(self.trainer.state_dict())
        base = str(self._config.student.init or "")

        def write(folder: Path) -> None:
            save_policy(model, folder)
            if lora is not None:
                write_adapter(folder / ADAPTER, state["adapters"], lora, base)
            torch.save(state, folder / LEARNER_STATE)

        return write

    def load_state(self, folder: Path) -> None:
        """Take up the state in learner.pt; CheckpointError where there is none."""
        path = folder / LEARNER_STATE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {LEARNER_STATE}: it was not written by a student in one process in float32. "
                "Set trainer.placement and trainer.dtype as they were."
            )
        self.trainer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def close(self) -> None:
        """Nothing to free."""


def checkpoint_bytes(model: Policy) -> int:
    """About the size of a checkpoint: all weights, two moments of those that learn, and a tenth to spare."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return int(1.1 * sum(size * (3 if learns else 1) for size, learns in sizes))


def _copied(value: Any) -> Any:
    """Dicts, lists and tuples with copies of their tensors in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
