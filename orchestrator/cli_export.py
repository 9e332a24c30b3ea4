"""The command `export`: a published mixture becomes a pipeline folder that diffusers load, here or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator import __version__
from orchestrator.cli_options import json_option, show
from orchestrator.cli_registry import registry_option
from workers.contracts import InputError


@click.command()
@click.argument("model", metavar="MODEL[@alias|:version]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must not exist, or be empty.")
@registry_option
@click.option("--with-code", is_flag=True, help="Add the code, so that it loads with trust_remote_code=True where diffpruning is not.")
@click.option("--pipeline", metavar="DENSE", help="Dense pipeline (folder or Hub id) to take everything but the unet from.")
@click.option("--push-to-hub", "repo", metavar="OWNER/NAME", help="Also upload the folder, with your Hub login. Needs --with-code.")
@json_option
def export(model: str, out: Path, uri: str, with_code: bool, pipeline: str | None, repo: str | None, as_json: bool) -> None:
    """Write a published mixture as a complete diffusers pipeline, with a model card.

    Its files are checked first. Weights are copied as they are: what is loaded draws the same images, bit for bit.
    """
    from orchestrator import registry_pull
    from orchestrator.registry import Registry
    from orchestrator.store import storage_error

    books = Registry(uri)
    version = books.resolve(model)
    if repo is not None and not with_code:
        raise InputError("--push-to-hub needs --with-code: diffusers download no pipeline with a unet whose code is not beside it")
    from workers import export as exporting

    if repo is not None:
        exporting.check_repo(repo)
    folder = registry_pull.local(books, version, registry_pull.cache_folder(), lambda line: click.echo(line, err=True))
    try:
        found = exporting.export(folder, version.manifest(), version.reference, out, __version__, with_code, pipeline)
    except OSError as error:
        if storage_error(error) is not None:
            raise
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}") from None
    found = {"version": version.reference, **found}
    if repo is not None:
        found["pushed"] = exporting.push(out, repo)
    show(found, as_json, lambda: _text(found))


def _text(found: dict[str, Any]) -> str:
    code = [name for name in found["files"] if name.endswith(".py")]
    lines = [f"{found['version']:<18}{found['pipeline']} with {found['scheduler']}, {len(found['files'])} files in {found['out']}"]
    lines += [f"{'code':<18}{', '.join(code)}"] if code else []
    lines += [f"{key:<18}{found[key]}" for key in ("note", "pushed") if key in found]
    return "\n".join(lines)
