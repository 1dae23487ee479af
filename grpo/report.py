"""One self-contained page about a run, finished or not: what it gained, how it went, and completions to read."""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from grpo.report_charts import CHARTS, STATUS_CHART, TIME_CHART, Chart, draw, missing, series
from grpo.report_completions import compare_completions
from rollout.durable import write_bytes
from rollout.errors import UserError
from rollout.run import CONFIG, SUMMARY, read_metrics

_MAX_ROWS = 100
# (heading, patterns of dotted config keys, in the order shown); the whole config follows them on the page.
_SETUP: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Policy", ("policy.*",)),
    ("Data", ("template", "data.*")),
    ("Step", ("seed", "num_steps", "num_prompts", "group_size", "learner.num_minibatches")),
    ("Sampling", ("sampling.*", "engine.kind", "engine.dtype", "engine.num_engines", "engine.placement")),
    ("Algorithm", ("algorithm.*",)),
    ("Optimizer", ("learner.lr", "learner.lr_scale.*", "learner.w*", "learner.max_grad_norm")),
    ("Held-out measurement", ("eval.num_*", "eval.k", "eval.temperature", "eval.top_p")),
)
_ACCURACIES = ("pass_at_1", "greedy", "majority_at_k", "pass_at_k")
_TABLE_KEYS = (
    "step",
    "reward_mean",
    "accuracy",
    "eval_pass_at_1",
    "completion_tokens_mean",
    "kl",
    "entropy",
    "clip_fraction",
    "logprob_gap_mean",
    "grad_norm",
    "loss",
    "tokens_per_s",
    "seconds_total",
)


def write_report(run_dir: Path) -> Path:
    """Write `<run>/report.html` from what the folder holds so far, and return its path; UserError if it is no run's."""
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise UserError(
            f"{run_dir} is not a run folder: it has no {CONFIG}. `groupzero train` makes run folders under runs/."
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(_contents(run_dir))
    path = run_dir / "report.html"
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def _contents(run_dir: Path) -> dict[str, Any]:
    config_toml = (run_dir / CONFIG).read_text(errors="replace")
    summary = _read_json(run_dir / SUMMARY)
    known = summary or _measured_so_far(run_dir)
    metrics = [line for line in read_metrics(run_dir) if "step" in line]
    comparisons, template = compare_completions(run_dir)
    return {
        "name": run_dir.resolve().name,
        "is_finished": bool(summary),
        "facts": _facts(summary, metrics),
        "gains": _gains(known),
        "headline": _change(known, "pass_at_1"),
        "learning_or_sharpening": summary.get("learning_or_sharpening"),
        "notices": _notices(summary, metrics),
        "setup": _setup(_parse_toml(config_toml), summary),
        "charts": [_card(metrics, chart) for chart in CHARTS],
        "time_chart": _card(metrics, TIME_CHART, width=9.2, height=5.6),
        "step_times": _step_times(metrics),
        "stage_times": _stage_times(summary),
        "status_chart": _card(metrics, STATUS_CHART, width=9.2, height=2.2),
        "statuses": _statuses(metrics),
        "comparisons": comparisons,
        "template": template,
        "table_keys": _TABLE_KEYS,
        "table": _table(metrics),
        "num_steps_recorded": len(metrics),
        "config_toml": config_toml,
        "versions": _read_json(run_dir / "versions.json"),
        "git": _read_json(run_dir / "git.json"),
    }


def _facts(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    facts = [f"{summary.get('num_steps', len(metrics))} steps"]
    if (wall := summary.get("wall_s")) is not None:
        facts.append(_duration(wall))
    if engine := summary.get("engine"):
        facts.append(f"engine {engine}")
    facts += [f"policy of {size}"] if (size := _model_size(summary)) else []
    return facts


def _model_size(summary: Mapping[str, Any]) -> str:
    model = summary.get("model") or {}
    total, active = model.get("total_params"), model.get("active_params")
    if total is None:
        return ""
    return f"{_count(total)} parameters" + (f", {_count(active)} active per token" if active is not None else "")


def _change(summary: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    if before is None and after is None:
        return None
    points = None if before is None or after is None else (after - before) * 100
    return {"before": before, "after": after, "points": points}


def _measured_so_far(run_dir: Path) -> dict[str, Any]:
    """What the summary of an unfinished run would say of the held-out measurements done already."""
    known: dict[str, Any] = {}
    for when in ("before", "after"):
        result = _read_json(run_dir / f"eval_{when}.json")
        known |= {f"{key}_{when}": result.get(key) for key in _ACCURACIES}
        known["k"] = result.get("k", known.get("k", "k"))
    return known


def _gains(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    k = summary.get("k", "k")
    rows = (
        ("pass_at_1", "pass@1", "one sample is right"),
        ("greedy", "greedy", "the answer at temperature 0 is right"),
        ("majority_at_k", f"majority@{k}", "the most frequent answer is right"),
        ("pass_at_k", f"pass@{k}", f"at least one of {k} samples is right"),
    )
    found = [(label, hint, _change(summary, key)) for key, label, hint in rows]
    return [{"label": label, "hint": hint} | change for label, hint, change in found if change is not None]


def _notices(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    notices: list[str] = []
    if not summary:
        notices.append(
            f"This run isn't finished (no {SUMMARY} yet): steps recorded so far: {len(metrics)}, and the accuracy "
            "after training is not known."
        )
    if not metrics:
        notices.append("No step is recorded yet, so there are no curves.")
        return notices
    if skipped := sum(bool(line.get("skipped")) for line in metrics):
        notices.append(
            f"{skipped} of {len(metrics)} steps were skipped, in whole or in part: loss or gradient not finite."
        )
    scored = sum(_sum(metrics, curve.key) for curve in STATUS_CHART.curves)
    for key, what in (("status_error", "the verifier failed"), ("status_timeout", "the verifier ran out of time")):
        if count := int(_sum(metrics, key)):
            notices.append(f"{count:,} of {int(scored):,} samples have no real verdict: {what}.")
    _, truncated = series(metrics[-10:], "truncated_share")
    if len(truncated) and truncated.mean() > 0.2:
        notices.append(f"{truncated.mean():.0%} of the last completions were cut off at the token limit.")
    gap = summary.get("logprob_gap_mean")
    if isinstance(gap, int | float) and gap > 0.05:
        notices.append(
            f"The mean log-probability gap is {gap:.3f} nats: engine and learner disagree on the same weights."
        )
    return notices


def _setup(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    flat = _flatten(config)
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for heading, patterns in _SETUP:
        rows = [(key, _text(flat[key])) for pattern in patterns for key in fnmatch.filter(flat, pattern)]
        if heading == "Policy" and (size := _model_size(summary)):
            rows.insert(0, ("size", size))
        if rows:
            groups.append((heading, rows))
    rewards = [reward for reward in config.get("rewards", ()) if isinstance(reward, Mapping)]
    if rewards:
        texts = [(_text(r.get("name")), f"{r.get('verifier')} x {_text(r.get('weight', 1.0))}") for r in rewards]
        groups.insert(2, ("Reward", texts))
    return groups


def _card(
    metrics: Sequence[Mapping[str, Any]], chart: Chart, *, width: float = 4.6, height: float = 2.1
) -> dict[str, Any]:
    absent = missing(metrics, chart)
    _, values = series(metrics, chart.curves[0].key)
    edge = max(min(len(values) // 6, 5), 1)
    # The SVG is drawn from numbers and from labels of our own; no text of a model or a dataset gets into it.
    svg = draw(metrics, chart, width=width, height=height)
    return {
        "title": chart.title,
        "hint": chart.hint,
        "svg": Markup(svg) if svg else None,
        "first": format(float(values[:edge].mean()), chart.form) if len(values) else None,
        "last": format(float(values[-edge:].mean()), chart.form) if len(values) > 1 else None,
        "legend": [(curve.label, curve.colour) for curve in chart.curves if curve.label not in absent],
        "missing": absent if svg else [curve.key for curve in chart.curves],
    }


def _step_times(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    totals = [(curve, _sum(metrics, curve.key)) for curve in TIME_CHART.curves]
    whole, count = sum(total for _, total in totals), max(len(metrics), 1)
    if not whole:
        return []
    return [
        {"label": curve.label, "colour": curve.colour, "seconds": total / count, "share": total / whole}
        for curve, total in totals
    ]


def _stage_times(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = {name: value for name, value in (summary.get("seconds_by_stage") or {}).items() if value is not None}
    whole = sum(stages.values())
    if not whole:
        return []
    return [{"label": name, "time": _duration(value), "share": value / whole} for name, value in stages.items()]


def _statuses(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    edge = max(min(len(metrics) // 6, 5), 1)
    parts = {"all": metrics, "first": metrics[:edge], "last": metrics[-edge:]}
    counts = {name: [_sum(lines, curve.key) for curve in STATUS_CHART.curves] for name, lines in parts.items()}
    if not sum(counts["all"]):
        return []
    shares = {name: [value / max(sum(values), 1) for value in values] for name, values in counts.items()}
    return [
        {
            "label": curve.label,
            "colour": curve.colour,
            "count": int(counts["all"][index]),
            "first": shares["first"][index],
            "last": shares["last"][index],
            "edge": edge,
        }
        for index, curve in enumerate(STATUS_CHART.curves)
    ]


def _table(metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    stride = -(-len(metrics) // _MAX_ROWS) or 1
    shown = [line for index, line in enumerate(metrics) if index % stride == 0 or index == len(metrics) - 1]
    return [[_text(line.get(key)) for key in _TABLE_KEYS] for line in shown]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(errors="replace"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Mend or remove it, then ask for the report again.") from error
    return value if isinstance(value, dict) else {}


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        # The page still shows the text as it is; only the short table of the set-up needs it parsed.
        return {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _sum(metrics: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(line.get(key) or 0 for line in metrics))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
