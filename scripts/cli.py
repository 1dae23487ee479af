"""The `groupzero` command: parse, build, call. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pydantic import BaseModel

    from scripts.score import ScoreSummary

OURS = {"grpo", "verifiers", "rollout", "policy", "distill", "scripts"}
TRACEBACK_VARIABLE = "GROUPZERO_TRACEBACK"
INTERRUPTED = 130


class ErrorReportingGroup(TyperGroup):
    """Shows errors that our packages define as one red block: exit status 2 for a UserError, 1 for the others.

    Any other exception keeps its traceback; an interrupt that the command did not handle exits quietly with 130.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if not is_ours(error):
                raise
            raise typer.Exit(show_error(error)) from None


def is_ours(error: BaseException) -> bool:
    """Whether the error's class is defined in one of our packages, so that its message alone tells what to do."""
    return type(error).__module__.partition(".")[0] in OURS


def show_error(error: Exception) -> int:
    """Print the error to stderr in red and return the exit status."""
    from rollout.errors import UserError

    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    typer.secho(f"error: {error}", fg="red", err=True)
    return 2 if isinstance(error, UserError) else 1


app = typer.Typer(
    cls=ErrorReportingGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train language models to reason with rewards that a rule can check (GRPO), and distil what they learnt.",
    epilog=f"{TRACEBACK_VARIABLE}=1 shows the traceback of every error.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, for instance configs/quickstart.toml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: seed=7 rewards.0.weight=2")
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="only go on with a run that is there; never start one")
    ] = False,
) -> None:
    """Train a policy with GRPO, or go on with a run that was stopped; `groupzero config train` lists the fields."""
    from scripts.train_command import run_train

    run_train(config, overrides or [], resume=resume)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a model on documents (question and completion) until it measures well enough; kept by content."""
    from scripts.train_command import run_sft

    run_sft(config, overrides or [])


@app.command("distill")
def distill_student(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="only go on with a run that is there; never start one")
    ] = False,
) -> None:
    """Train a student on traces by supervised learning; a run that was stopped goes on."""
    from scripts.distill_command import run_distill

    run_distill(config, overrides or [], resume=resume)


@app.command()
def traces(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="only go on with a run that is there; never start one")
    ] = False,
) -> None:
    """Gather a teacher's traces (sampled, asked for or imported) and select among them."""
    from scripts.traces_command import run_traces

    run_traces(config, overrides or [], resume=resume)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="CONFIG|CHECKPOINT", help="TOML file or checkpoint folder")],
    overrides: Overrides = None,
) -> None:
    """Measure pass@1, pass@k and majority@k on held-out problems."""
    from scripts.train_command import run_eval

    run_eval(target, overrides or [])


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint folder")],
    question: Annotated[str, typer.Argument(metavar='"QUESTION"')],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1, help="answers to sample")] = 1,
    template: Annotated[str, typer.Option(help="r1_zero, plain, chat, or a text with {question} in it")] = "r1_zero",
    max_completion_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
) -> None:
    """Ask a trained policy one question."""
    from scripts.train_command import run_sample

    run_sample(
        checkpoint,
        question,
        temperature=temperature,
        num_samples=num_samples,
        template=template,
        max_completion_tokens=max_completion_tokens,
    )


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="run folder (its newest checkpoint) or checkpoint folder")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder in Hugging Face format")],
    dtype: Annotated[
        str, typer.Option(help="type of the weights: float32, bfloat16, or fp8 (DeepSeek-V3's released format)")
    ] = "float32",
) -> None:
    """Write a checkpoint as a plain Hugging Face folder, without the learner's state; also while the run trains."""
    from scripts.export_command import run_export

    source = run_export(checkpoint, out, dtype)
    typer.echo(f"{source} exported to {out} ({dtype})")


@app.command()
def score(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="rows: completion, answer, [prompt, metadata, verifier]")
    ],
    verifier: Annotated[str, typer.Option(metavar="NAME", help="math, code, by_task, ..., or package.module:function")],
    out: Annotated[Path, typer.Option(metavar="SCORED.jsonl", help="the same rows in order, each with a verdict")],
    num_workers: Annotated[int, typer.Option(min=1, help="verifier processes")] = 2,
    timeout_s: Annotated[float, typer.Option(min=0.01, help="longest time for one row, in seconds")] = 5.0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="option of the verifier, as JSON")
    ] = None,
) -> None:
    """Score completions with a verifier, in processes that can be killed."""
    from scripts.score import parse_options, score_file

    summary = score_file(file, verifier, out, num_workers, timeout_s, parse_options(option or []))
    typer.echo("\n".join([*summary_lines(summary), f"written to {out}"]))


def summary_lines(summary: ScoreSummary) -> list[str]:
    """What was scored, in lines for the terminal; statuses that did not occur are left out."""
    lines = [
        f"{summary.num_rows} rows in {summary.seconds:.1f} s ({summary.rows_per_s:.0f} rows/s)",
        f"mean score {summary.mean_score:.4f}",
    ]
    for status, count in summary.counts.items():
        if count:
            lines.append(f"  {status:<11}{count:>8}  {count / summary.num_rows:6.1%}")
    if summary.worker_restarts:
        lines.append(f"  verifier processes replaced: {summary.worker_restarts}")
    return lines


@app.command("model")
def describe_model(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|CHECKPOINT", help="TOML file, config.json, checkpoint folder, or deepseek_v3"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="length that attention and cache are counted for [4096 or the model's]")
    ] = None,
    precision: Annotated[str, typer.Option(help="of training: fp32, bf16 or fp8")] = "bf16",
    ranks: Annotated[int, typer.Option(min=1, help="processes that share the training state")] = 1,
    expert_parallel: Annotated[int, typer.Option(min=1, help="ranks that split the experts among them")] = 1,
) -> None:
    """Say what a model costs: parameters, decoding cache, FLOPs per token, memory to train it."""
    from scripts.model_command import run_model

    run_model(
        target,
        as_json=as_json,
        context_tokens=context_tokens,
        precision=precision,
        num_ranks=ranks,
        expert_parallel=expert_parallel,
    )


@app.command("verify-data")
def verify_data(
    file: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL, JSON or Parquet file with gold answers")],
    verifier: Annotated[
        str, typer.Option(metavar="NAME", help="the verifier whose view of the golds is asked")
    ] = "math",
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="option of the verifier, as JSON")
    ] = None,
    answer_field: Annotated[str | None, typer.Option(help="field with the gold; default: the first known one")] = None,
    examples: Annotated[int, typer.Option(min=0, help="examples shown of every status")] = 5,
    out: Annotated[Path | None, typer.Option(metavar="AUDIT.jsonl", help="every row's audit")] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="verifier processes")] = 2,
) -> None:
    """Audit a data set's gold answers: unparsable, ambiguous, embedded numbers, with counts and examples."""
    from scripts.score import parse_options
    from scripts.verify_data import audit_lines, verify_data

    options = parse_options(option or [])
    audit = verify_data(file, verifier, options, examples, out, answer_field=answer_field, num_workers=num_workers)
    typer.echo("\n".join(audit_lines(audit)))


@app.command("verifier-report")
def verifier_report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, such as runs/quickstart-0")],
    judge: Annotated[
        bool, typer.Option("--judge", help="ask about each suspicious verdict, and keep the answers")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="try the verifiers on all judged cases again")] = False,
) -> None:
    """Say what a run's verifiers said, and show the verdicts that a person should look at."""
    from scripts.verifier_report import run_verifier_report

    def ask(question: str) -> str:
        return typer.prompt(question, default="s", show_default=False)

    raise typer.Exit(run_verifier_report(run, judging=judge, checking=check, ask=ask, show=typer.echo))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, such as runs/quickstart-0")],
) -> None:
    """Write a run's report.html, also while the run goes on."""
    from grpo.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say what is installed, which engines, kernels and devices will be used, and how to mend what is missing."""
    from scripts.doctor import examine, print_report

    if sys.stderr.isatty():
        typer.echo("trying the imports of torch, vllm, ray and transformers (10 to 60 s) ...", err=True)
    examination = examine()
    if as_json:
        typer.echo(examination.to_json())
    else:
        print_report(examination)
    raise typer.Exit(0 if examination.can_run_quickstart else 1)


@app.command("config")
def show_config(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="train or sft")],
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="check this file, print it resolved")] = None,
    overrides: Overrides = None,
) -> None:
    """List every field of a command's config, or check a config file and print it resolved."""
    model = config_model(command)
    if path is not None:
        from rollout.toml_config import load_config, to_toml

        typer.echo(to_toml(load_config(model, path, overrides or [])), nl=False)
        return
    from scripts.config_table import print_fields

    print_fields(model)


def config_model(command: str) -> type[BaseModel]:
    """The config class of a command; UserError for a command that has none."""
    from rollout.errors import UserError

    if command == "train":
        from grpo.config import TrainConfig

        return TrainConfig
    if command == "sft":
        from distill.sft import SftConfig

        return SftConfig
    if command == "traces":
        from distill.traces import TracesConfig

        return TracesConfig
    if command == "distill":
        from distill.student_config import DistillConfig

        return DistillConfig
    raise UserError(f"{command!r} has no config: use `groupzero config` with train, sft, traces or distill")


if __name__ == "__main__":
    sys.exit(app())
