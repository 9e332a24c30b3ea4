"""The `diffpruning registry` commands: what is published, under which names, whether it is whole, and how it is moved and removed."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.aliases import DEFAULT
from orchestrator.cli_options import device_here, json_option, printable, show
from workers.contracts import GOLDEN, InputError, VerificationError

if TYPE_CHECKING:
    from orchestrator.registry import Registry, Version

registry_option = click.option(
    "--registry",
    "uri",
    default="registry",
    show_default=True,
    help="Folder of the registry, or s3:// or gs://bucket/prefix?endpoint_override=...",
)
MODEL = "MODEL[@alias|:version]"


@click.group()
def registry() -> None:
    """Published mixtures."""


@registry.command(name="list")
@click.argument("name", required=False)
@registry_option
@json_option
def list_command(name: str | None, uri: str, as_json: bool) -> None:
    """Versions, with budget, cost, quality and aliases. A damaged one is named at the end (exit code 4); the others are listed."""
    books, rows, damaged = _open(uri), list[dict[str, Any]](), list[str]()
    named: dict[str, dict[int, list[str]]] = {}
    for version in books.some_versions(name):
        if version.name not in named:
            named[version.name] = {}
            try:
                named[version.name] = books.aliases_of(version.name)
            except VerificationError as error:
                damaged.append(str(error))
        try:
            rows.append({**_row(version), "aliases": named[version.name].get(version.number, [])})
        except VerificationError as error:
            damaged.append(str(error))
            rows.append({"version": version.reference, "error": str(error), "path": version.where})

    def text() -> str:
        return "\n".join(
            [f"{'version':<18}{'budget':<14}{'agent':<10}{'experts':>8}  {'of dense':<12}{'paired MSE':>12}", *map(_line, rows)]
        )

    _show(rows, as_json, text)
    if damaged:
        raise VerificationError("; ".join(damaged))


def _row(version: Version) -> dict[str, Any]:
    manifest = version.manifest()
    mine = manifest.metrics.get(manifest.plan.budget.name, {})
    return {
        "version": version.reference,
        "budget": manifest.plan.budget.name,
        "agent": manifest.plan.agent,
        "experts": len(manifest.plan.experts),
        "cost_ratio": round(manifest.plan.cost_ratio, 4),
        "of": manifest.plan.budget.quantity,
        "macs_ratio": round(manifest.plan.macs_ratio, 4),
        "paired_mse": mine.get("paired_mse"),
        "denoising_loss": mine.get("denoising_loss"),
        "path": version.where,
    }


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['version']:<18}damaged"
    error = f"{row['paired_mse']:>12.5f}" if isinstance(row["paired_mse"], float) else " " * 12
    line = f"{row['version']:<18}{row['budget']:<14}{row['agent']:<10}{row['experts']:>8}  {row['cost_ratio']:.3f} {row['of']:<6}{error}"
    return f"{line}  {', '.join(row['aliases'])}".rstrip()


@registry.command(name="show")
@click.argument("model", metavar=MODEL)
@registry_option
@json_option
def show_command(model: str, uri: str, as_json: bool) -> None:
    """One version: intervals, architectures, cost, quality, where it comes from."""
    from orchestrator import status as view

    version = _open(uri).resolve(model)
    manifest = version.manifest()

    def text() -> str:
        try:
            return view.manifest_text(version.reference, version.where, manifest)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError) as error:
            raise VerificationError(f"{version.reference}: manifest.json: cannot be shown as a table ({error!r}): use --json") from None

    _show(manifest.to_json(), as_json, text)


@registry.command(name="verify")
@click.argument("model", metavar=MODEL, required=False)
@click.option("--hashes-only", is_flag=True, help="Do not load the mixture.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to draw; auto: cuda if there is one.")
@registry_option
@json_option
def verify_command(model: str | None, hashes_only: bool, device: str, uri: str, as_json: bool) -> None:
    """Check one version, or all: every file against its hash; then load it, draw its golden samples, and compare them.

    Of a version without golden samples, one sampling step is taken.
    """
    books = _open(uri)
    versions = [books.resolve(model)] if model else books.some_versions()
    results, errors = [], []
    for version in versions:
        try:
            results.append({"version": version.reference, "ok": True, **_verified(books, version, None if hashes_only else device)})
        except VerificationError as error:
            errors.append(str(error))
            results.append({"version": version.reference, "ok": False, "error": str(error)})

    def line(row: dict[str, Any]) -> str:
        drawn = "" if hashes_only else ", loaded; no golden samples: took one sampling step"
        drawn = f", {row['samples']} golden samples within {row['difference']:.4f}" if "samples" in row else drawn
        return f"{row['version']:<18}ok, {row['files']} files{drawn}"

    _show(results, as_json, lambda: "\n".join(line(row) for row in results if row["ok"]) or "nothing verified")
    if errors:
        raise VerificationError("; ".join(errors))


def _verified(books: Registry, version: Version, device: str | None) -> dict[str, Any]:
    """How many files, which checks were made, and if it holds golden samples, how well they are met. Raises: VerificationError."""
    from orchestrator.registry_pull import pull

    if device is None:
        return {"files": books.verify(version), "checks": ["hashes"]}
    manifest = version.manifest()
    from workers import golden

    with tempfile.TemporaryDirectory() as temporary:
        folder = version.path if books.is_local else Path(temporary) / "version"
        if books.is_local:
            books.verify(version)
        else:
            pull(version, folder)  # which verifies
        try:
            if GOLDEN in manifest.files:
                found = golden.compare(folder, device_here(device, "--device"))
                return {"files": len(manifest.files), "checks": ["hashes", "golden samples"], **found}
            golden.try_out(folder, manifest.plan.budget.scheduler, device_here(device, "--device"))
            return {"files": len(manifest.files), "checks": ["hashes", "one sampling step"]}
        except VerificationError as error:
            raise VerificationError(f"{version.reference}: {error}") from None


@registry.command()
@click.argument("model", metavar="MODEL[:version]")
@click.argument("alias", default=DEFAULT)
@click.option(
    "--require", multiple=True, metavar="NAME<=NUMBER", help="Refuse unless this holds, e.g. 'paired_mse<=0.01' or 'fd_delta<=0.3'."
)
@click.option("--expect", metavar="VERSION|none", help="Refuse if the alias names another version than this now.")
@registry_option
@json_option
def promote(model: str, alias: str, require: tuple[str, ...], expect: str | None, uri: str, as_json: bool) -> None:
    """Let ALIAS (champion) name a version, after checking every file of it.

    --require compares a number of its results, or with _delta behind it, its difference from the version that the alias names now; with
    _dense_delta, from the dense model. If somebody moves the alias meanwhile, nothing changes and the exit code is 1.
    """
    from orchestrator import promotion

    books = _open(uri)
    version = books.resolve(model)
    expected = _expected(expect)
    event = promotion.promote(books, version, alias, expected, require)
    found = {"alias": f"{version.name}@{alias}", "version": version.reference, "moved": event is not None}
    _show({**found, **({} if event is None else {"event": event.to_json()})}, as_json, lambda: _moved(found, event))


@registry.command()
@click.argument("model", metavar="MODEL[@alias]")
@registry_option
@json_option
def rollback(model: str, uri: str, as_json: bool) -> None:
    """Let an alias (champion) name again what it named before its last promotion."""
    from orchestrator import promotion

    name, alias = _split(model)
    event = promotion.rollback(_open(uri), name, alias)
    found = {"alias": f"{name}@{alias}", "version": None if event.version is None else f"{name}:{event.version}", "moved": True}
    _show({**found, "event": event.to_json()}, as_json, lambda: _moved(found, event))


@registry.command()
@click.argument("model", metavar="MODEL[@alias]")
@registry_option
@json_option
def history(model: str, uri: str, as_json: bool) -> None:
    """Every move of a model's aliases, or of one: when, by whom, from where to where."""
    from orchestrator import aliases

    books = _open(uri)
    name = model.partition("@")[0]
    if ":" in name:
        name = name.partition(":")[0]
        raise InputError(f"history {model}: aliases are moved, not versions: give {name} or {name}@{DEFAULT}")
    books.resolve(name)
    chosen = [aliases.checked(model.partition("@")[2])] if "@" in model else aliases.known(books.files, name)
    events = sorted(
        (event for alias in chosen for event in aliases.history(books.files, name, alias)), key=lambda e: (e.at, e.alias, e.number)
    )

    def text() -> str:
        lines = [
            f"{e.at}  {f'{name}@{e.alias}':<24}{e.action:<10}{_named(name, e.previous)} -> {_named(name, e.version)}  by {e.by}"
            + (f"  required {', '.join(e.required)}" if e.required else "")
            for e in events
        ]
        return "\n".join(lines) or f"no alias of {model} was ever moved"

    _show([event.to_json() for event in events], as_json, text)


@registry.command()
@click.argument("a", metavar="MODEL_A")
@click.argument("b", metavar="MODEL_B")
@registry_option
@json_option
def diff(a: str, b: str, uri: str, as_json: bool) -> None:
    """What two versions differ in: plan, experts, results, settings, origin and files."""
    from orchestrator import registry_compare

    books = _open(uri)
    found = registry_compare.diff(books.resolve(a), books.resolve(b))

    def text() -> str:
        lines = [f"{found['a']} -> {found['b']}"]
        for part in ("plan", "config", "origin"):
            lines += [f"{part:<8} {row['key']}: {row['a']} -> {row['b']}" for row in found[part]]
        for row in found["experts"]:
            told = f"only in {found[row['only']]}" if "only" in row else f"{row['sites']} of {row['of']} sites, first {row['first'][0]}"
            lines.append(f"{'expert':<8} {row['interval']}: {told}")
        for row in found["results"]:
            change = "" if row["change"] is None else f"  ({row['change']:+.4g})"
            lines.append(f"{'result':<8} {row['name']}: {_number(row['a'])} -> {_number(row['b'])}{change}")
        files = found["files"]
        counts = [
            f"{files['same']} the same",
            *(f"{len(files[key])} {key.replace('_', ' in ')}" for key in ("changed", "only_a", "only_b")),
        ]
        return "\n".join([*lines, f"{'files':<8} {', '.join(counts)}"])

    _show(found, as_json, text)


@registry.command()
@click.argument("model", metavar=MODEL)
@registry_option
@json_option
def lineage(model: str, uri: str, as_json: bool) -> None:
    """What a version was made of, and what else in the registry was made of the same."""
    from orchestrator import registry_compare

    books = _open(uri)
    found = registry_compare.lineage(books, books.resolve(model))

    def text() -> str:
        came = found["origin"]
        lines = [
            f"model    {came['model']} (sha256 {came['model_digest'][:12]})  also {_several(found['same_model'])}",
            f"data     {came['data']} (sha256 {came['data_digest'][:12]})  also {_several(found['same_data'])}",
            f"run      {came['job']}, seed {came['seed']} (fingerprint {came['fingerprint'][:12]})  also {_several(found['same_run'])}",
            f"made by  {', '.join(f'{name} {number}' for name, number in came['versions'].items())}",
            f"version  {found['version']}: {found['budget']}, agent {found['agent']}; named by {_several(found['aliases'])}",
        ]
        lines += [f"shares   {count} weight files with {other}" for other, count in found["shares_weight_files_with"].items()]
        lines += [f"moved    {e['at']}  {e['alias']}: {e['action']} to {e['version']} by {e['by']}" for e in found["moves"]]
        return "\n".join(lines)

    _show(found, as_json, text)


@registry.command()
@click.argument("model", metavar=MODEL)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make; one that a killed pull left is continued.")
@registry_option
@json_option
def pull(model: str, out: Path, uri: str, as_json: bool) -> None:
    """Fetch a version as a plain folder, checked file by file. The same command again continues."""
    from orchestrator import registry_pull

    version = _open(uri).resolve(model)
    fetched = registry_pull.pull(version, out, lambda line: click.echo(line, err=True))
    found = {"version": version.reference, "out": str(out.resolve()), "fetched_bytes": fetched}
    _show(found, as_json, lambda: str(out))


@registry.command()
@click.argument("name", required=False)
@click.option("--keep-aliased", is_flag=True, help="Also remove the versions that no alias names or goes back to.")
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="Also remove them but for the newest N of each name.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--grace-hours",
    default=24.0,
    show_default=True,
    type=click.FloatRange(0),
    help="What killed publishers left is removed when it is older; less than a publisher takes breaks the publisher.",
)
@registry_option
@json_option
def gc(name: str | None, keep_aliased: bool, keep_last: int | None, dry_run: bool, grace_hours: float, uri: str, as_json: bool) -> None:
    """Free what nothing names: files of removed versions, and what killed publishers left. NAME: of this mixture alone.

    Equal files of all mixtures are one blob, so blobs that no version of any mixture names are freed whatever NAME is.
    Versions are removed only with --keep-aliased or --keep-last; one that an alias names or would name after a rollback, and the newest of
    each name, never is.
    """
    from orchestrator.registry_clean import clean

    found = clean(_open(uri), name, keep_aliased, keep_last, dry_run, grace_hours)
    would = "would be " if dry_run else ""

    def text() -> str:
        lines = [f"{reference:<18}{would}removed" for reference in found.versions]
        young = f"; {found.too_young} younger than {grace_hours:g} h were left" if found.too_young else ""
        return "\n".join([*lines, f"{len(found.debris)} files {would}freed, {found.freed_bytes / 1e6:.1f} MB{young}"])

    _show({"dry_run": dry_run, **vars(found)}, as_json, text)


@registry.command()
@click.argument("model", metavar="MODEL:version")
@registry_option
@json_option
def rm(model: str, uri: str, as_json: bool) -> None:
    """Remove a version that no alias names or goes back to; the same again finishes a removal that was killed.

    Its number is not used again; `registry gc` frees what it shared with none.
    """
    from orchestrator.registry_clean import removable, remove

    if ":" not in model:
        raise InputError(f"rm {model}: give the version's number too, e.g. {model.partition('@')[0]}:7")
    books = _open(uri)
    version = removable(books, model)
    remove(books, version)
    _show({"removed": version.reference}, as_json, lambda: f"{version.reference} removed")


def _open(uri: str) -> Registry:
    from orchestrator.registry import Registry

    return Registry(uri)


def _show(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """As `show`; what a manifest's author wrote cannot steer the terminal."""
    show(value, as_json, lambda: printable(text()))


def _split(model: str) -> tuple[str, str]:
    name, _, alias = model.partition("@")
    return name, alias or DEFAULT


def _expected(text: str | None) -> int | None | str:
    if text is None:
        return "any"
    if text == "none":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise InputError(f"--expect {text!r} is neither the number of a version nor none")
    return int(text)


def _moved(found: dict[str, Any], event: Any) -> str:
    if event is None:
        return f"{found['alias']} names {found['version']} already"
    name = found["alias"].partition("@")[0]
    return f"{found['alias']}: {_named(name, event.previous)} -> {_named(name, event.version)}"


def _named(name: str, number: int | None) -> str:
    return "nothing" if number is None else f"{name}:{number}"


def _several(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
