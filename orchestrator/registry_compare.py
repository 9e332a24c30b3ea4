"""What two versions differ in, and where a version comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import aliases
from orchestrator.promotion import numbers
from orchestrator.registry import Registry, Version
from workers.contracts import GOLDEN, MixtureManifest, SamplerRef, VerificationError
from workers.records import differing


def diff(a: Version, b: Version) -> dict[str, Any]:
    """As JSON: what differs in plan, experts, results, settings, origin and files. Raises: VerificationError."""
    one, two = a.manifest(), b.manifest()
    return {
        "a": a.reference,
        "b": b.reference,
        "plan": _rows(_plan(one), _plan(two)),
        "experts": _experts(one, two),
        "results": [
            {"name": name, "a": found.get(name), "b": other.get(name), "change": _change(found.get(name), other.get(name))}
            for found, other in [(numbers(one), numbers(two))]
            for name in sorted({*found, *other})
            if found.get(name) != other.get(name)
        ],
        "config": _rows(_flat(one.config), _flat(two.config)),
        "origin": _rows(_flat(_origin(one)), _flat(_origin(two))),
        "files": {
            "same": sum(two.files.get(path) == digest for path, digest in one.files.items()),
            "changed": sorted(path for path in one.files if two.files.get(path, one.files[path]) != one.files[path]),
            "only_a": sorted(set(one.files) - set(two.files)),
            "only_b": sorted(set(two.files) - set(one.files)),
        },
    }


def lineage(registry: Registry, version: Version) -> dict[str, Any]:
    """As JSON: model, data and run that a version was made of, and what else in the registry has them or its experts in common.

    Raises: VerificationError if the version itself cannot be read; damaged relatives are left out.
    """
    manifest, moved = version.manifest(), registry.aliases_of(version.name)
    relatives: dict[str, list[str]] = {"same_run": [], "same_model": [], "same_data": []}
    shared: dict[str, int] = {}
    weights = {digest for path, digest in manifest.files.items() if path.endswith(".safetensors") and path != GOLDEN}
    for other in registry.versions():
        if other == version:
            continue
        try:
            found = other.manifest()
        except VerificationError:
            continue
        for key, field in (("same_run", "fingerprint"), ("same_model", "model_digest"), ("same_data", "data_digest")):
            if getattr(found.provenance, field) == getattr(manifest.provenance, field):
                relatives[key].append(other.reference)
        if common := len(weights & set(found.files.values())):
            shared[other.reference] = common
    events = [
        {"alias": alias, **event.to_json()}
        for alias in aliases.known(registry.files, version.name)
        for event in aliases.history(registry.files, version.name, alias)
        if version.number in (event.version, event.previous)
    ]
    return {
        "version": version.reference,
        "aliases": moved.get(version.number, []),
        "origin": _origin(manifest),
        "agent": manifest.plan.agent,
        "budget": manifest.plan.budget.name,
        **relatives,
        "shares_weight_files_with": shared,
        "moves": events,
    }


def _plan(manifest: MixtureManifest) -> dict[str, Any]:
    plan = manifest.plan
    return {
        "family": manifest.family,
        "budget": plan.budget.name,
        "sampler": SamplerRef(plan.budget.scheduler, plan.budget.steps, 0.0, manifest.epsilon_scale).name,
        "agent": plan.agent,
        "seed": plan.seed,
        "intervals": ", ".join(interval.name for interval in plan.partition.intervals),
        "search loss": plan.loss,
    }


def _experts(one: MixtureManifest, two: MixtureManifest) -> list[dict[str, Any]]:
    """Per interval of either: how many sites differ, or in which of the two it is."""
    specs = [dict(zip((i.name for i in m.plan.partition.intervals), m.plan.experts, strict=True)) for m in (one, two)]
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys([*specs[0], *specs[1]]):
        a, b = (spec.get(name) for spec in specs)
        if a is None or b is None:
            found.append({"interval": name, "only": "a" if b is None else "b"})
        elif sites := differing(a.choices, b.choices):
            found.append({"interval": name, "sites": len(sites), "of": len({*a.choices, *b.choices}), "first": list(sites[0])})
    return found


def _origin(manifest: MixtureManifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.provenance.to_json().items() if key != "schema"}


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{above}{key}.") if isinstance(item, Mapping) and item else {f"{above}{key}": item}
    return found


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key, "a": one, "b": two} for key, one, two in differing(a, b)]


def _change(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a
