"""What an exported mixture says of itself: README.md with YAML front matter that the Hub reads, how to load it, what it costs and does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from workers.contracts import MixtureManifest, MixturePlan

MEASURED = {
    "frechet": "Frechet distance",
    "kid": "Kernel distance",
    "denoising_loss": "Denoising loss, held-out images",
    "paired_mse": "MSE to the dense model, same noise",
    "paired_psnr_db": "PSNR to the dense model, same noise (dB)",
    "paired_ssim": "SSIM to the dense model, same noise",
    "paired_lpips": "LPIPS to the dense model, same noise",
}
TAGS = ("diffusers", "pruned", "diffpruning", "mixture-of-experts")
TASK = "unconditional-image-generation"


@dataclass(frozen=True)
class Exported:
    """What is in the folder. ``call``: arguments of the pipeline's call; ``imports``: the statement that imports its class; ``dense``: what
    was pruned, a name without its place."""

    pipeline: str
    imports: str
    call: str
    with_code: bool
    dense: str
    weight_bytes: int


def model_name(path: str) -> str:
    """``org/name`` of a model from the Hub, else the last part of its path: a card names no place on somebody's machine."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    return f"{found[1]}/{found[2]}" if found else path.rstrip("/").rpartition("/")[2]


def card(manifest: MixtureManifest, reference: str, made: Exported) -> str:
    """The whole README.md."""
    plan, mine = manifest.plan, manifest.metrics.get(manifest.plan.budget.name, {})
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=model_name(manifest.provenance.data),
            dataset_name=model_name(manifest.provenance.data),
            metric_type=key,
            metric_name=MEASURED[key],
            metric_value=value,
        )
        for key, value in _measured(mine)
    ]
    data = ModelCardData(
        model_name=manifest.name,
        library_name="diffusers",
        pipeline_tag=TASK,
        base_model=made.dense,
        tags=list(TAGS),
        eval_results=results,
    )
    sections = [
        _what(manifest, made),
        _load(made),
        _experts(plan),
        _quality(manifest.metrics, plan.budget.name),
        _origin(manifest, reference),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n# {manifest.name}\n\n" + "\n".join(sections)


def _measured(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((key, float(row[key])) for key in MEASURED if row.get(key) is not None)


def _what(manifest: MixtureManifest, made: Exported) -> str:
    plan, scale = manifest.plan, manifest.epsilon_scale
    scaled = f" The noise that it predicts is divided by {scale} ([epsilon scaling](https://arxiv.org/abs/2308.15321))."
    return (
        f"{made.dense}, pruned into a mixture of {len(plan.experts)} experts, one for each interval of timesteps, by "
        "[DiffPruning](https://arxiv.org/abs/2409.15557). A step takes "
        f"{plan.macs_ratio:.1%} of the dense model's MACs, averaged over {plan.budget.scheduler} with {plan.budget.steps} steps. "
        f"The `unet` weighs {made.weight_bytes / 1e6:.1f} MB; of it, one expert works at a time.{scaled if scale != 1 else ''}\n"
    )


def _load(made: Exported) -> str:
    draw = f"images = pipeline({made.call}).images\n```\n"
    installed = [
        "```python",
        made.imports,
        "from workers.mixture import MixtureDenoiser",
        "",
        'unet = MixtureDenoiser.from_pretrained("FOLDER/unet")',
        f'pipeline = {made.pipeline}.from_pretrained("FOLDER", unet=unet)',
        draw,
    ]
    if not made.with_code:
        return "\n".join(["## Use", "", "With diffpruning installed:", "", *installed])
    own = [
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        draw,
        "The code that runs then is `unet/workers.mixture.py` and what lies beside other parts: read it first.",
    ]
    if made.imports.startswith("from diffusers"):
        own += ["With diffpruning installed, none of it is needed:", "", *installed]
    return "\n".join(["## Use", "", *own])


def _experts(plan: MixturePlan) -> str:
    lines = ["## Experts", "", "| timesteps | part of the steps | MACs of dense | parameters | dropped branches |", "|---|---|---|---|---|"]
    for interval, spec, share, cost in zip(plan.partition.intervals, plan.experts, plan.shares, plan.expert_costs, strict=True):
        dropped = sum(choice == 0 for choice in spec.choices.values())
        macs = cost.macs / plan.dense_cost.macs
        lines.append(f"| [{interval.start}, {interval.stop}) | {share:.0%} | {macs:.1%} | {cost.params / 1e6:.2f}M | {dropped} |")
    return "\n".join([*lines, ""])


def _quality(metrics: dict[str, Any], mine: str) -> str:
    """This mixture beside the dense model, where both were measured."""
    rows = {label: dict(_measured(row)) for label, row in metrics.items() if label in ("dense", mine) and isinstance(row, dict)}
    keys = [key for key in MEASURED if any(key in row for row in rows.values())]
    if not keys:
        return ""
    lines = ["## Quality", "", f"| | {' | '.join(MEASURED[key] for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for label, row in rows.items():
        cells = [f"{row[key]:.4g}" if key in row else "" for key in keys]
        lines.append(f"| {'dense' if label == 'dense' else 'this mixture'} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _origin(manifest: MixtureManifest, reference: str) -> str:
    came = manifest.provenance
    versions = ", ".join(f"{name} {version}" for name, version in came.versions.items())
    lines = [
        "## Origin",
        "",
        f"Exported from {reference}, budget {manifest.plan.budget.name}, agent {manifest.plan.agent}, seed {came.seed}; {versions}.",
        f"Dense model sha256 {came.model_digest[:12]}, data {model_name(came.data)} (sha256 {came.data_digest[:12]}), "
        f"run {came.fingerprint[:12]}.",
    ]
    return "\n".join([*lines, ""])
