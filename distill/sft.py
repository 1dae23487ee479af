"""Supervised training on documents (a question and its completion) by plain next-token loss, until it measures well enough.

It makes base models from random weights; the result is kept by content, so the same config, code and seed train once.
A little over 400 lines, because its config is read beside the run that it describes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from policy.account import account_of
from policy.auxiliary import AuxiliaryTotals, auxiliary_loss
from policy.balance import balance_experts
from policy.checkpoint import atomic_folder, load_policy, save_policy
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.interface import Policy
from policy.layer_groups import layer_group
from policy.logprobs import token_logprobs
from policy.optim import Muon, warmup_then_linear
from policy.packing import layout, pack_by_length
from rollout.durable import replacing, write_json
from rollout.engine import SamplingParams
from rollout.errors import UserError
from rollout.evaluation import evaluate
from rollout.interrupt import RunInterrupted, stop_on_signal
from rollout.records import Task
from rollout.run import Observer
from rollout.sampling import Prompter
from rollout.tasks import DataConfig, load_tasks
from rollout.templates import TEMPLATES, check_template
from rollout.tokenizer import load_tokenizer, stop_ids, train_tokenizer
from rollout.torch_engine import TorchEngine
from verifiers.pool import ScorePool, VerifierSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = (
    "policy/**/*.py",
    "distill/sft.py",
    "verifiers/*.py",
    "rollout/[!vw]*.py",  # engines other than torch's and the sync of weights have no part in it
)


class SftError(RuntimeError):
    """Training ended without what was asked of it: the loss is not finite, or the quality was not reached."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def check_shape(values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they are the shape of a policy or of a dense model; ValueError names what is not."""
    try:
        config_of_shape({"vocab_size": 1 << 16, **values})
    except TypeError as error:
        raise ValueError(f"not the shape of a policy: {str(error).partition('()')[2].strip() or error}") from error
    return values


def config_of_shape(shape: Mapping[str, Any]) -> PolicyConfig | DenseConfig:
    """A DeepSeek policy's config, or with a `model_type` that of a dense model."""
    return DenseConfig.of_shape(shape) if "model_type" in shape else PolicyConfig(**shape)


class SftOptimizerConfig(_Table):
    """Muon for weight matrices, AdamW for the rest (embedding, head, router, norms): warm up, hold, decay to 0."""

    muon_lr: float = Field(default=0.003, gt=0, description="learning rate of weight matrices")
    adamw_lr: float = Field(default=0.004, gt=0, description="learning rate of embedding, head, router and norm gains")
    warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up")
    decay_steps: int = Field(default=150, ge=1, description="length of the fall of both rates to 0, in steps")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients of the AdamW parameters are scaled down to this norm"
    )
    balance_gamma: float = Field(
        default=0.01, ge=0, description="step of the routing biases towards even load, per optimizer step"
    )
    balance_alpha: float = Field(
        default=0.0, ge=0, description="weight of the sequence-wise balance loss (DeepSeek-V3: 1e-4)"
    )
    mtp_loss_weight: float = Field(
        default=0.3,
        ge=0,
        description="weight of multi-token prediction, where the model has it (DeepSeek-V3: 0.3, later 0.1)",
    )


class SftEvalConfig(_Table):
    """The measured quality at which the rates begin to fall; training ends when they are 0."""

    data: DataConfig = Field(description="held-out tasks")
    verifier: str = Field(default="numeric", description="what judges a completion")
    num_problems: int = Field(default=128, ge=1, description="how many tasks, from the first")
    num_samples: int = Field(default=2, ge=1, description="samples per task at temperature 1")
    every_steps: int = Field(
        default=50, ge=1, description="measure every so many steps until the rates fall, and at the end"
    )
    max_completion_tokens: int = Field(default=128, ge=1, description="longest completion, in tokens")
    decay_at_pass_at_1: float = Field(
        ge=0, le=1, description="pass@1 at which the rates begin to fall; latest decay_steps before max_steps"
    )
    required_pass_at_1: float = Field(default=0.0, ge=0, le=1, description="a finished model below this is an error")


class SftConfig(_Table):
    """A supervised run from random weights (`model`) or from a checkpoint (`init`)."""

    name: str = Field(min_length=1, description="name of the run")
    seed: int = Field(default=0, ge=0, description="seed of weights and documents")
    output_dir: Path = Field(default=Path("runs/base"), description="finished models are kept here, by content")
    template: Annotated[str, AfterValidator(check_template)] = Field(default="r1_zero", description="prompt template")
    init: Path | None = Field(default=None, description="checkpoint to start from, with its tokenizer")
    model: Annotated[dict[str, Any], AfterValidator(check_shape)] | None = Field(
        default=None,
        description="shape of a new policy: PolicyConfig's fields but vocab_size, or model_type and the fields of a dense one",
    )
    vocab_size: int = Field(default=512, ge=300, description="largest vocabulary of the new tokenizer")
    tokenizer_documents: int = Field(default=2000, ge=1, description="documents that the new tokenizer is trained on")
    data: DataConfig = Field(description="documents: the prompt is the question, the answer is the completion's text")
    num_documents: int = Field(default=128, ge=1, description="documents per optimizer step")
    max_steps: int = Field(ge=1, description="optimizer steps at most")
    max_tokens_per_microbatch: int = Field(
        default=8192, ge=1, description="tokens in one forward pass; a matter of memory only"
    )
    num_threads: int = Field(default=2, ge=1, description="CPU threads")
    optimizer: SftOptimizerConfig = Field(default_factory=SftOptimizerConfig, description="optimizers")
    eval: SftEvalConfig = Field(description="the quality to stop at")

    @model_validator(mode="after")
    def _one_start(self) -> SftConfig:
        if (self.init is None) == (self.model is None):
            raise ValueError("set exactly one of init and model")
        return self


@dataclass(frozen=True)
class SftResult:
    """The finished checkpoint, its measured pass@1, and the seconds this call took (near 0 when it was kept from before)."""

    folder: Path
    pass_at_1: float
    seconds: float


def output_folder(config: SftConfig) -> Path:
    """Where this config's result is kept: its name and a hash of config, code and seed."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"output_dir", "num_threads"}).encode())
    digest.update(torch.__version__.encode())
    for pattern in MADE_BY:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for path in filter(None, (config.init, config.data.path, config.eval.data.path)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return config.output_dir / f"{config.name}-{config.seed}-{digest.hexdigest()[:12]}"


def train_sft(config: SftConfig, observer: Observer) -> SftResult:
    """The trained checkpoint of a config, made now unless it is there already; UserError or SftError says what is wrong.

    Asked to stop by SIGINT or SIGTERM it saves what it has, raises RunInterrupted, and the next call goes on from there;
    killed, it goes on from the last of the states that it saves every `eval.every_steps`.
    """
    started = time.monotonic()
    folder = output_folder(config)
    with _only_one(folder, observer):
        if not (folder / "config.json").exists():
            specs = [VerifierSpec(name="accuracy", verifier=config.eval.verifier)]
            with stop_on_signal() as stop, ScorePool(specs) as pool:
                _Training(config, folder, pool, observer).run(stop)
    measured = json.loads((folder / "quality.json").read_text())
    return SftResult(folder, measured["pass_at_1"], time.monotonic() - started)


class _Training:
    """One supervised run."""

    def __init__(self, config: SftConfig, folder: Path, pool: ScorePool, observer: Observer):
        torch.set_num_threads(config.num_threads)
        self.config, self.folder, self.pool, self.observer = config, folder, pool, observer
        self.partial = folder.with_name(f"{folder.name}.partial.pt")
        self.documents = load_tasks(config.data)
        held_out = load_tasks(config.eval.data)
        count = min(config.eval.num_problems, len(held_out))
        self.problems = [held_out.task(index) for index in range(count)]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = self._start()
        self.model.to(self.device)
        context = self.model.config.max_position_embeddings
        self.prompter = Prompter(self.tokenizer, config.template, context, config.eval.max_completion_tokens)
        for problem in self.problems:
            self.prompter.ids(problem)
        self.muon, self.adamw = _optimizers(self.model, config.optimizer)
        self.step = 0
        self.decay_from: int | None = None

    def _start(self) -> tuple[Policy, PreTrainedTokenizerBase]:
        config = self.config
        if config.init is not None:
            return load_policy(config.init), load_tokenizer(config.init)
        assert config.model is not None
        template = TEMPLATES.get(config.template, config.template)
        before, _, after = template.partition("{question}")
        chat = f"{{{{ {before!r} + messages[-1]['content'] + {after!r} }}}}"
        count = min(config.tokenizer_documents, len(self.documents))
        documents = (self.documents.task(index) for index in range(count))
        texts = (f"{before}{task.prompt}{after}{task.answer}" for task in documents)
        tokenizer = train_tokenizer(texts, config.vocab_size, chat)
        shape = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if "model_type" in config.model:
            # transformers' default would be a token of another vocabulary.
            shape["bos_token_id"] = tokenizer.bos_token_id
        policy_config = config_of_shape(config.model | shape)
        model = DensePolicy(policy_config) if isinstance(policy_config, DenseConfig) else DeepseekPolicy(policy_config)
        model.reset_parameters(config.seed)
        return model, tokenizer

    def run(self, stop: threading.Event) -> None:
        """Train until the quality is reached, measuring every so often; write the checkpoint."""
        config = self.config
        size = account_of(self.model.config).parameters
        self.observer.stage(
            "base model",
            f"{size.total / 1e6:.2f}M parameters, {size.active / 1e6:.2f}M active; "
            f"decay at pass@1 {config.eval.decay_at_pass_at_1:g}",
        )
        if self.partial.exists():
            self._resume()
        optimizer = config.optimizer
        quality = 0.0
        while not self._done():
            if stop.is_set():
                self._save_partial()
                raise RunInterrupted(
                    f"stopped at step {self.step} of the base model; the same command goes on from there"
                )
            metrics = self._train_step(warmup_then_linear(optimizer.warmup_steps, *self._decay())(self.step))
            self.step += 1
            due = self.decay_from is None and self.step % config.eval.every_steps == 0
            if due or self._done():
                quality = metrics["eval_pass_at_1"] = self._measure()
                if self.decay_from is None and quality >= config.eval.decay_at_pass_at_1:
                    self.decay_from = self.step
                elif self._done() and quality < config.eval.required_pass_at_1:
                    self._once_more()
            if self.step % config.eval.every_steps == 0 and not self._done():
                self._save_partial()
            self.observer.step(self.step, self._decay()[1], metrics)
        if quality < config.eval.required_pass_at_1:
            raise SftError(
                f"pass@1 is {quality:.3f} after {self.step} steps, below eval.required_pass_at_1="
                f"{config.eval.required_pass_at_1:g}. Raise max_steps or eval.decay_at_pass_at_1, or lower the bar."
            )
        with atomic_folder(self.folder) as temporary:
            save_policy(self.model, temporary)
            self.tokenizer.save_pretrained(temporary)
            write_json(temporary / "quality.json", {"pass_at_1": quality, "steps": self.step, "seed": config.seed})
        self.partial.unlink(missing_ok=True)

    def _decay(self) -> tuple[int, int]:
        """The steps at which the rates begin to fall and reach 0, as far as is known now."""
        most, length = self.config.max_steps, min(self.config.optimizer.decay_steps, self.config.max_steps)
        start = most - length if self.decay_from is None else min(self.decay_from, most - length)
        return start, start + length

    def _once_more(self) -> None:
        """Hold the full rates for another decay's length and fall again, if max_steps leaves room for that."""
        start = self.step + self.config.optimizer.decay_steps
        if start + self.config.optimizer.decay_steps <= self.config.max_steps:
            self.decay_from = start
            self.observer.message("the base is not good enough yet: training goes on")

    def _done(self) -> bool:
        return self.step >= self._decay()[1]

    def _train_step(self, rate: float) -> dict[str, float]:
        config, start = self.config, time.monotonic()
        for optimizer, lr in ((self.muon, config.optimizer.muon_lr), (self.adamw, config.optimizer.adamw_lr)):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
        self.model.train()
        pairs = [self._encode(task) for task in self.documents.for_step(config.seed, self.step, config.num_documents)]
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
        num_targets = sum(len(completion) for _, completion in pairs)
        if max(lengths) > config.max_tokens_per_microbatch:
            raise UserError(
                f"a document has {max(lengths)} tokens, more than max_tokens_per_microbatch={config.max_tokens_per_microbatch}"
            )
        totals = self._auxiliary_totals(pairs)
        loss_sum = 0.0
        for rows in pack_by_length(lengths, config.max_tokens_per_microbatch):
            loss, auxiliary = self._loss([pairs[row] for row in rows], totals)
            loss = loss / num_targets
            (loss + auxiliary).backward()
            loss_sum += float(loss.detach())
        if not math.isfinite(loss_sum):
            raise SftError(
                f"the loss is {loss_sum} at step {self.step}: lower optimizer.muon_lr and optimizer.adamw_lr"
            )
        rest = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(rest, config.optimizer.max_grad_norm)
        self.muon.step()
        self.adamw.step()
        load = balance_experts(self.model, config.optimizer.balance_gamma)
        return {
            "loss": loss_sum,
            "grad_norm": float(norm),
            **load.metrics(),
            "tokens_per_s": sum(lengths) / (time.monotonic() - start),
        }

    def _encode(self, task: Task) -> tuple[list[int], list[int]]:
        """Prompt ids and completion ids, end token included."""
        prompt = list(self.prompter.ids(task))
        completion = self.tokenizer(str(task.answer), add_special_tokens=False)["input_ids"]
        return prompt, [*completion, *stop_ids(self.tokenizer)]

    def _auxiliary_totals(self, pairs: Sequence[tuple[list[int], list[int]]]) -> AuxiliaryTotals:
        """The whole step's targets ahead, and sequences."""
        _, position_ids, _, mask = self._packed(pairs)
        return AuxiliaryTotals.of(position_ids, mask, len(pairs), len(self.model.mtp_layers))

    def _packed(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input_ids [T], position_ids [T], cu_seqlens [B + 1] and the mask [T] of completions."""
        device = self.device
        tokens = [token for prompt, completion in pairs for token in (*prompt, *completion)]
        _, position_ids, cu_seqlens = layout(torch.tensor([len(p) + len(c) for p, c in pairs], device=device))
        mask = torch.tensor([place >= len(p) for p, c in pairs for place in range(len(p) + len(c))], device=device)
        return torch.tensor(tokens, device=device), position_ids, cu_seqlens, mask

    def _loss(self, pairs: Sequence[tuple[list[int], list[int]]], totals: AuxiliaryTotals) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the completions, in nats, and this part's share of the auxiliary losses."""
        options = self.config.optimizer
        input_ids, position_ids, cu_seqlens, mask = self._packed(pairs)
        said = token_logprobs(
            self.model,
            input_ids,
            position_ids,
            cu_seqlens,
            mask=mask,
            mtp=bool(self.model.mtp_layers) and options.mtp_loss_weight > 0,
            return_balance_loss=options.balance_alpha > 0,
        )
        auxiliary = auxiliary_loss(
            said, totals, mtp_loss_weight=options.mtp_loss_weight, balance_alpha=options.balance_alpha
        )
        return -said.logprobs.sum(), auxiliary

    def _measure(self) -> float:
        """pass@1 on the held-out tasks, sampled by the torch engine at temperature 1."""
        config = self.config.eval
        engine = TorchEngine(self.model, max_model_len=self.model.config.max_position_embeddings)
        params = SamplingParams(
            max_completion_tokens=config.max_completion_tokens,
            stop_token_ids=stop_ids(self.tokenizer),
        )
        result, _ = evaluate(
            engine,
            self.prompter,
            self.pool,
            self.problems,
            params,
            num_samples=config.num_samples,
            k=1,
            seed=self.config.seed,
            greedy=False,
        )
        return result.pass_at_1

    def _save_partial(self) -> None:
        state = {
            "step": self.step,
            "decay_from": self.decay_from,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }
        with replacing(self.partial) as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        state = torch.load(self.partial, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.step, self.decay_from = state["step"], state["decay_from"]
        self.observer.message(f"going on from step {self.step} of an interrupted base model")


def _optimizers(model: Policy, config: SftOptimizerConfig) -> tuple[Muon, torch.optim.AdamW]:
    """Muon on the weight matrices of attention and feed-forward layers, AdamW on everything else."""
    by_adamw = {"embedding", "head", "router", "norms"}
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if layer_group(name) not in by_adamw]
    rest = [parameter for name, parameter in named if layer_group(name) in by_adamw]
    return Muon(matrices, lr=config.muon_lr), torch.optim.AdamW(
        rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0
    )


@contextmanager
def _only_one(folder: Path, observer: Observer) -> Iterator[None]:
    """Two runs that need the same base train it once: the second waits for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            observer.message(f"another run is making {folder}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
