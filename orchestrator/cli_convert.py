"""The command `convert-ldm`: a CompVis latent-diffusion checkpoint becomes a diffusers pipeline folder."""

from __future__ import annotations

import json
from typing import Any

import click

from workers.contracts import InputError


@click.command(name="convert-ldm")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--config", required=True, metavar="YAML", help="The checkpoint's CompVis yaml: the architecture is read from it.")
@click.option("--out", required=True, metavar="DIR", help="Pipeline folder to write; it must not exist, or be empty.")
@click.option("--no-ema", is_flag=True, help="Take the plain weights even if the checkpoint has averaged (EMA) ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def convert_ldm(checkpoint: str, config: str, out: str, no_ema: bool, as_json: bool) -> None:
    """Turn a CompVis latent-diffusion checkpoint (.ckpt or .safetensors) into a diffusers pipeline folder.

    No code in the checkpoint is run. What diffusers cannot express exactly is refused by its key in the yaml.
    """
    from orchestrator.store import storage_error
    from workers.convert_ldm import convert

    try:
        found = convert(checkpoint, config, out, ema=not no_ema)
    except OSError as error:
        if storage_error(error) is not None:
            raise
        raise InputError(f"--out: cannot write {out}: {error.strerror}") from None
    click.echo(json.dumps(found, indent=1) if as_json else _text(found))


def _text(found: dict[str, Any]) -> str:
    lines = []
    for name, facts in found["written"].items():
        rest = ", ".join(_fact(key, value) for key, value in facts.items() if key != "class")
        lines.append(f"{name:<16}{facts['class']}: {rest}")
    lines += [f"{name:<16}left out: {why}" for name, why in found["left_out"].items()]
    return "\n".join([*lines, f"{'pipeline':<16}{found['out']}"])


def _fact(key: str, value: Any) -> str:
    if key == "parameters":
        return f"{value:,} parameters"
    if isinstance(value, float):
        return f"{key} {value:.6g}"
    return f"{value} weights" if key == "weights" else f"{key} {value}"
