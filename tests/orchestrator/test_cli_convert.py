"""`diffpruning convert-ldm` from the outside: what it prints, and exit code 2 with one line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from orchestrator.cli import Command
from orchestrator.cli_convert import convert_ldm
from tests.compvis import Network, settings, unet, write
from workers.families import load_denoiser

ROOT = Path(__file__).parents[2]
UNET = {
    **{"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2]},
    **{"num_res_blocks": 1, "attention_resolutions": [2], "num_head_channels": 16},
}


def convert(*arguments: object) -> Result:
    """The command in this process. An exception that is not turned into a line is the test's failure."""
    group = Command(commands=[convert_ldm])
    return CliRunner().invoke(group, ["convert-ldm", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A small checkpoint with plain and averaged weights, and its yaml."""
    net = Network()
    unet(net, UNET, torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1 for key, value in net.weights.items()}
    return write(tmp_path, net.weights | averages, settings(UNET))


def test_it_says_what_was_written_and_what_was_left_out(files, tmp_path):
    done = convert(files[0], "--config", files[1], "--out", tmp_path / "out")
    assert done.exit_code == 0
    parameters = sum(parameter.numel() for parameter in load_denoiser(tmp_path / "out").parameters())
    assert done.stdout.splitlines() == [
        f"unet            UNet2DModel: {parameters:,} parameters, ema weights",
        "scheduler       DDIMScheduler: beta_schedule scaled_linear, beta_start 0.0015, beta_end 0.0195",
        "vqvae           left out: neither config.yaml nor model.ckpt has one",
        f"pipeline        {tmp_path / 'out'}",
    ]


def test_averages_can_be_declined(files, tmp_path):
    for name, options in (("ema", ()), ("plain", ("--no-ema",))):
        done = convert(files[0], "--config", files[1], "--out", tmp_path / name, "--json", *options)
        assert json.loads(done.stdout)["written"]["unet"]["weights"] == name
    biases = [load_denoiser(tmp_path / name).conv_out.bias for name in ("ema", "plain")]
    assert torch.allclose(biases[0], biases[1] + 1)


@pytest.mark.parametrize("option", ["--config", "--out"])
def test_a_missing_option_is_a_usage_error(files, tmp_path, option):
    options = {"--config": files[1], "--out": tmp_path / "out"}
    del options[option]
    assert convert(files[0], *(part for pair in options.items() for part in pair)).exit_code == 2


def spoilt(files: tuple[Path, Path], tmp_path: Path, how: str) -> tuple[list[object], str]:
    """Arguments that cannot work, and a part of the line that says so."""
    checkpoint, config = files
    out = tmp_path / "out"
    if how == "no checkpoint":
        checkpoint = tmp_path / "nowhere.ckpt"
        told = f"no such file: {checkpoint}"
    elif how == "no yaml":
        config = tmp_path / "nowhere.yaml"
        told = f"no such file: {config}"
    elif how == "out below a device":
        out = Path("/dev/null/out")
        told = "--out: /dev/null/out cannot be made"
    elif how == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
        told = "cannot be read"
    elif how == "another yaml":
        write(tmp_path, {}, settings({**UNET, "channel_mult": [1, 3]}))
        checkpoint, told = tmp_path / "kept.ckpt", "keys of another kind"
    elif how == "not expressible":
        config.write_text(config.read_text().replace("num_res_blocks: 1", "num_res_blocks: 1\n        dims: 3"))
        told = "model.params.unet_config.params.dims: 3"
    else:
        out, told = tmp_path, f"--out: {tmp_path} is not empty"
    return [checkpoint, "--config", config, "--out", out], told


SPOILT = ["no checkpoint", "no yaml", "truncated", "another yaml", "not expressible", "full folder", "out below a device"]


@pytest.mark.parametrize("how", SPOILT)
def test_bad_input_is_one_line_and_nothing_is_written(files, tmp_path, how):
    (tmp_path / "kept.ckpt").write_bytes(files[0].read_bytes())
    arguments, told = spoilt(files, tmp_path, how)
    before = sorted(tmp_path.rglob("*"))
    done = convert(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_starts_without_torch():
    code = "import sys, orchestrator.cli_convert; print([name for name in ('torch', 'diffusers', 'ray') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
