"""Is there a version of this mixture already? What a version is made of, what it says of itself, and when it is a new one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.evaluation import job_sampler
from orchestrator.pipeline import Context
from orchestrator.registry import Registry, Version
from workers import families
from workers.contracts import DenoiserRef, MixtureManifest, Provenance, SamplerRef


def item_of(ctx: Context, ref: DenoiserRef) -> tuple[DenoiserRef, str, SamplerRef, tuple[str, ...], str]:
    """What `workers.tasks_evaluate.assemble_mixture` writes a version's files from."""
    return ref, ctx.job.model.path, job_sampler(ctx.job), tuple(ctx.job.export.rewrites), str(_folder(ctx, ref))


def publish(ctx: Context, ref: DenoiserRef, metrics: Mapping[str, Any]) -> Version:
    """The version of an assembled mixture, verified: a new one, unless the registry holds one of the same plan and files."""
    registry, job = Registry(ctx.job.registry.path), ctx.job
    known = {version.number for version in registry.versions(job.name)}
    version = registry.publish(job.name, _manifest(ctx, ref, metrics), _folder(ctx, ref))
    files, where = registry.verify(version), f"{ref.label}, {version.where}"
    if version.number in known:
        ctx.say(f"  kept {version.reference}: {where}: plan and {files} files are the same; its metrics stay those of its publication")
    else:
        ctx.say(f"  published {version.reference}: {where}: {files} files verified")
    return version


def _folder(ctx: Context, ref: DenoiserRef) -> Path:
    return ctx.folder / f"mixture-{ref.label}"


def _manifest(ctx: Context, ref: DenoiserRef, metrics: Mapping[str, Any]) -> MixtureManifest:
    """What the version says of itself: results of dense and of its budget alone, and the settings without the places of this machine."""
    assert ref.plan is not None, ref.label
    job = ctx.job
    return MixtureManifest(
        name=job.name,
        family=families.family_name(job.model.path),
        plan=ref.plan,
        metrics={label: row for label, row in metrics.items() if label.startswith(("dense", ref.label))},
        config=job.model_dump(mode="json", exclude={"storage", "registry", "resources"}),
        provenance=Provenance(
            job=job.name,
            fingerprint=ctx.fingerprint,
            model=job.model.path,
            model_digest=ctx.identity["model"],
            data=job.data.path,
            data_digest=ctx.identity["data.path"],
            seed=job.seed,
            versions={"diffpruning": __version__, **{name: version_of(name) for name in ("torch", "diffusers", "accelerate")}},
        ),
        files={},
    )
