"""Bad input, from the outside: one line that names the culprit, the right exit code, nothing half-written."""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from orchestrator.cli import main
from orchestrator.registry import Registry
from orchestrator.store import RunStore
from workers.contracts import ArchitectureSpec, Budget, Cost, MixtureManifest, MixturePlan, Partition, Provenance

ROOT = Path(__file__).parents[2]
QUICK = (
    "similarity.measure=snr",
    "similarity.timesteps=6",
    "similarity.images=2",
    "partition.experts=2",
    "data.holdout=4",
    "evaluate.images=2",
    "evaluate.samples=2",
    "budgets=[{ratio: 0.65}, {ratio: 0.5}]",
)


def diffpruning(*arguments: object) -> Result:
    """The command in this process. An exception that is not turned into a line is the test's failure."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def sets(overrides: tuple[str, ...]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs, registry and whatever a command might write by mistake stay in the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path, emoji) -> Path:
    """A copy of the bundled model, to be broken."""
    return Path(shutil.copytree(emoji, tmp_path / "model"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve PNGs that fit the bundled model."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.effect_noise((32, 32), 20 + i).convert("RGB").save(folder / f"image-{i:02d}.png")
    return folder


def line_of(result: Result, code: int) -> str:
    """The one line that a refused command says."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


COMMANDS = {"plan": ("plan",), "plan --json": ("plan", "--json"), "run": ("run", "--inline", "--json", "--only", "analyze")}
each_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


def refused(command: tuple[str, ...], *overrides: str, job: object = "quickstart", code: int = 2) -> str:
    """The line said, after seeing that nothing was written."""
    before = tree(Path.cwd())
    line = line_of(diffpruning(*command, job, *sets((*QUICK, *overrides))), code)
    assert tree(Path.cwd()) == before
    return line


# --- settings ---------------------------------------------------------------------------------------------------------


@each_command
@pytest.mark.parametrize(
    ("override", "code", "told"),
    [
        ("specialise.steps=3", 2, "unknown key specialise: did you mean specialize?"),
        ("specialize.step=3", 2, "unknown key specialize.step: did you mean steps?"),
        ("specialize.steps=few", 2, "specialize.steps is 'few'"),
        ("model.family=vae", 2, "model.family 'vae' is unknown: known are "),
        ("budgets.0.ratio=0", 2, "budgets.0.ratio is 0: must be greater than 0"),
        ("budgets.0.ratio=1.5", 2, "budgets.0.ratio is 1.5: must be less than or equal to 1"),
        ("budgets.1.ratio=0.01", 3, "budgets.1.ratio is 0.01, but the smallest mixture needs 0."),
        ("elastic={depth: false, width_multiple: 64}", 3, "budgets.0.ratio is 0.65, but the smallest mixture needs "),
        ("partition.experts=7", 2, "partition.experts is 7, but a grid of 6 timesteps (similarity.timesteps) has room for 6 intervals"),
        ("partition.min_timesteps=600", 2, "partition.experts is 2, but a grid of 6 timesteps (similarity.timesteps) has room for 1"),
        ("partition={experts: auto, min_timesteps: 600}", 2, "partition.experts is auto, but a grid of 6 timesteps"),
        ("partition.experts=[500, 1000]", 2, "partition.experts: boundaries [500, 1000] must ascend within (0, 1000)"),
        ("partition.experts=[500, 300]", 2, "partition.experts: boundaries [500, 300] must ascend"),
        ("similarity.timesteps=1001", 2, "similarity.timesteps is 1001: give 1 to 1000"),
        ("sampler.scheduler=magic", 2, "sampler.scheduler 'magic' is unknown: known are ddpm, ddim"),
        ("sampler.steps=1001", 2, "sampler.steps 1001 is more than the model's 1000 training timesteps"),
        ("evaluate.timesteps=1001", 2, "evaluate.timesteps is 1001, but the model has 1000 training timesteps"),
        ("evaluate.shards=3", 2, "evaluate.shards is 3, but there are only 2 images or samples"),
        ("data.holdout=3583", 2, "data.holdout is 3583, but there are only 3583 images"),
        ("registry.path=ftp://bucket/models", 2, "registry 'ftp://bucket/models': is not a local path, file:///absolute/path, s3://bucket"),
        ("registry.path=s3://KEY:hush@bucket/models", 2, "registry s3://...: a URI must not hold credentials: put them into AWS_ACCESS"),
        ("noequals", 2, "--set 'noequals' is not of the form key.subkey=value"),
    ],
)
def test_a_wrong_setting_is_refused(command, override, code, told):
    assert told in refused(command, override, code=code)


@each_command
def test_a_job_that_is_not_there_is_refused(command):
    assert refused(command, job="gone.yaml").startswith("no such job file: gone.yaml; bundled jobs: ")


def test_the_model_s_own_family_is_accepted_and_every_other_refused():
    from workers import families

    assert diffpruning("plan", "quickstart", "--set", "model.family=unet2d").exit_code == 0
    for other in set(families.names()) - {"unet2d"}:
        assert refused(("plan",), f"model.family={other}").endswith("holds a model of family unet2d")


# --- the model --------------------------------------------------------------------------------------------------------


def without_unet(model: Path) -> str:
    shutil.rmtree(model / "unet")
    return f"model.path: {model} holds no unet/config.json"


def without_scheduler(model: Path) -> str:
    shutil.rmtree(model / "scheduler")
    return f"model.path: {model} holds no scheduler/scheduler_config.json"


def without_weights(model: Path) -> str:
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return f"model.path: {model / 'unet'} holds no .safetensors weights"


def truncated_weights(model: Path) -> str:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    return f"model.path: {weights} cannot be read: "


def empty_weights(model: Path) -> str:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, 0)
    return f"model.path: {weights} cannot be read: "


def truncated_config(model: Path) -> str:
    config = model / "unet" / "config.json"
    os.truncate(config, 40)
    return f"model.path: {config} cannot be read: "


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unknown_class(model: Path) -> str:
    edit(model / "unet" / "config.json", _class_name="VideoTransformer9D")
    return "model.path: a VideoTransformer9D is of no known model family: known are "


def class_labels(model: Path) -> str:
    edit(model / "unet" / "config.json", num_class_embeds=10)
    return f"data.path: {ROOT / 'jobs' / 'quickstart' / 'noto-emoji-32.parquet'} has no labels, but the model is told a class"


def flow_matching(model: Path) -> str:
    edit(model / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    return "model.path: scheduler FlowMatchEulerDiscreteScheduler has no DDPM training timesteps"


def nothing_there(model: Path) -> str:
    shutil.rmtree(model)
    return f"model.path: no such folder: {model}"


def a_file(model: Path) -> str:
    shutil.rmtree(model)
    model.write_text("a model")
    return f"model.path: {model} is a file"


@each_command
@pytest.mark.parametrize(
    "spoil",
    [
        nothing_there,
        a_file,
        without_unet,
        without_scheduler,
        without_weights,
        truncated_weights,
        empty_weights,
        truncated_config,
        unknown_class,
        class_labels,
        flow_matching,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_model_that_cannot_be_used_is_refused(command, model, spoil: Callable[[Path], str]):
    told = spoil(model)
    assert refused(command, f"model.path={model}").startswith(told)


# --- the images -------------------------------------------------------------------------------------------------------


def no_folder(images: Path) -> str:
    shutil.rmtree(images)
    return f"data.path: no such file or folder: {images}"


def no_files(images: Path) -> str:
    for path in images.iterdir():
        path.unlink()
    return f"data.path: no images under {images} (looked for .png"


def only_text(images: Path) -> str:
    no_files(images)
    (images / "readme.txt").write_text("no image")
    return f"data.path: no images under {images}"


def other_size(images: Path) -> str:
    for path in images.iterdir():
        Image.open(path).resize((48, 40)).save(path)
    return "data.path: images are 48x40, the model wants 32x32: set data.resize: true"


def both_kinds(images: Path) -> str:
    pq.write_table(pa.table({"image": [b"x"]}), images / "more.parquet")
    return f"data.path: {images} holds both images (image-00.png) and Parquet (more.parquet)"


def no_image_column(images: Path) -> str:
    no_files(images)
    pq.write_table(pa.table({"picture": [b"x"]}), images / "a.parquet")
    return f"data.path: {images / 'a.parquet'} has no column image"


def truncated_parquet(images: Path) -> str:
    no_files(images)
    pq.write_table(pa.table({"image": [b"x"] * 100}), images / "a.parquet")
    os.truncate(images / "a.parquet", 100)
    return f"data.path: {images / 'a.parquet'} is not a readable Parquet file"


def too_few(images: Path) -> str:
    for path in sorted(images.iterdir())[4:]:
        path.unlink()
    return f"data.holdout is 4, but there are only 4 images in {images}"


@each_command
@pytest.mark.parametrize(
    "spoil",
    [no_folder, no_files, only_text, other_size, both_kinds, no_image_column, truncated_parquet, too_few],
    ids=lambda spoil: spoil.__name__,
)
def test_images_that_cannot_be_used_are_refused(command, images, spoil: Callable[[Path], str]):
    told = spoil(images)
    assert refused(command, f"data.path={images}").startswith(told)


def test_images_of_another_size_are_taken_when_resizing_is_asked_for(images):
    other_size(images)
    done = diffpruning("plan", "quickstart", "--json", *sets((*QUICK, f"data.path={images}", "data.resize=true")))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"]["images"] == 12


def analyze(images: Path, *overrides: str) -> Result:
    arguments = sets((*QUICK, f"data.path={images}", *overrides))
    return diffpruning("run", "quickstart", "--inline", "--only", "analyze", "--json", *arguments)


def test_a_corrupt_image_in_the_middle_is_named_and_nothing_is_kept_of_the_rest(images):
    bad = images / "image-07.png"
    os.truncate(bad, bad.stat().st_size // 2)
    refused = analyze(images)
    assert (refused.exit_code, refused.stdout) == (2, "")
    *progress, last = refused.stderr.splitlines()
    assert last.startswith("error: data.path: image-07.png cannot be read (")
    assert last.endswith("): repair or remove it, or set data.on_error: skip")
    assert [line.split() for line in progress] == [["analyze", "running"]]
    assert not Path("runs/quickstart").exists()


def test_a_run_that_has_made_something_survives_a_refused_input(images):
    assert analyze(images).exit_code == 0
    run = Path("runs/quickstart")
    changing = ("progress.json", "job.json", ".lock")
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in changing}
    assert len(kept) > 2
    (images / "image-07.png").write_bytes(b"no image")
    assert analyze(images).exit_code == 2
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_corrupt_image_is_left_out_and_counted_when_asked_for(images):
    bad = images / "image-07.png"
    os.truncate(bad, bad.stat().st_size // 2)
    done = analyze(images, "data.on_error=skip")
    assert done.exit_code == 0, done.output
    assert "11 images decoded, 1 unreadable and skipped: image-07.png\n" in done.stderr
    assert json.loads(done.stdout)["published"] == {}
    assert analyze(images).exit_code == 2  # what was skipped once is not accepted when skipping is not asked for


def test_an_image_of_another_size_in_the_middle_is_named(images):
    Image.new("RGB", (32, 31)).save(images / "image-07.png")
    last = analyze(images, "data.on_error=skip").stderr.splitlines()[-1]
    assert last == "error: data.path: image-07.png is 32x31, the model wants 32x32: set data.resize: true to centre-crop and resize"


# --- storage and registry ---------------------------------------------------------------------------------------------


@each_command
@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
@pytest.mark.parametrize("key", ["storage.path", "registry.path"])
def test_a_path_at_or_below_a_file_is_refused(command, tmp_path, path, key):
    (tmp_path / "file").write_text("not a folder")
    assert refused(command, f"{key}={path}") == f"{key}: {tmp_path / 'file'} is a file, not a folder"


@each_command
def test_a_run_folder_of_another_job_is_refused(command, model, tmp_path, emoji):
    RunStore(tmp_path / "runs" / "quickstart").claim({"name": "quickstart", "model.path": str(emoji)})
    line = refused(command, f"model.path={model}")
    assert line.startswith(f"{tmp_path / 'runs/quickstart'} holds the run of another job (model.path {emoji}, this job has {model}): ")
    assert line.endswith("--set name=mine")


@each_command
def test_a_folder_that_is_no_run_is_refused(command, tmp_path):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "thesis.tex").write_text("precious")
    assert refused(command) == (
        f"storage.path: {tmp_path / 'runs/quickstart'} is not empty and holds no run: choose another storage.path or name"
    )


def test_a_run_folder_that_another_process_works_in_is_refused(tmp_path, images):
    assert analyze(images).exit_code == 0
    before = tree(tmp_path)
    with RunStore(tmp_path / "runs" / "quickstart").lock():
        line = line_of(analyze(images), 2)
    assert line.startswith(f"another diffpruning is running in {tmp_path / 'runs/quickstart'}: ")
    assert tree(tmp_path) == before


CAP_DAC_OVERRIDE = 1
CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write into the folder, root included: for as long, root gives up its right to pass over permissions."""
    folder.chmod(0o555)
    libc, header, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    root = os.geteuid() == 0
    if root:
        assert libc.capget(header, data) == 0
        held = data[0]  # the first of three words is what is in effect
        data[0] = held & ~(1 << CAP_DAC_OVERRIDE)
        assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        if root:
            data[0] = held
            assert libc.capset(header, data) == 0
        folder.chmod(0o755)


def test_read_only_storage_is_refused(tmp_path, images):
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        assert line_of(analyze(images), 2) == f"storage.path: cannot write {tmp_path / 'runs/quickstart'}: Permission denied"
    assert tree(tmp_path / "runs") == {}


def test_a_run_folder_that_became_read_only_is_refused_and_keeps_its_work(tmp_path, images):
    run = tmp_path / "runs" / "quickstart"
    assert analyze(images).exit_code == 0
    (run / ".lock").unlink(missing_ok=True)
    before = tree(run)
    with read_only(run):
        line = line_of(analyze(images), 1)
    assert line.startswith("no access to ")
    assert line.endswith("Permission denied")
    assert str(run) in line
    assert tree(run) == before


@contextlib.contextmanager
def no_room_for_more_than(size: int) -> Iterator[None]:
    """Writing a file beyond ``size`` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_storage_ends_the_run_with_one_line_and_the_same_command_continues(images):
    with no_room_for_more_than(20_000):
        full = analyze(images)
    assert (full.exit_code, full.stdout) == (1, "")
    *progress, last = full.stderr.splitlines()
    assert last.startswith("error: cannot write to ")
    assert last.endswith("make room and run the same command again; finished work is kept")
    assert [line.split() for line in progress] == [["analyze", "running"]]
    left = {path.name for path in Path("runs").rglob("*") if path.is_file()}
    assert left == {"run.json", "job.json", "progress.json", ".lock"}, "half-written files stayed"
    done = analyze(images)
    assert done.exit_code == 0, done.output


def test_a_device_that_is_not_there_is_refused(images):
    from workers.session import local_device

    refused = analyze(images, "resources.device=cuda")
    if local_device() == "cuda":
        assert refused.exit_code == 0
    else:
        assert line_of(refused, 2) == "resources.device is cuda, but this machine has no usable GPU: set it to cpu"


# --- published versions -----------------------------------------------------------------------------------------------


def publish(folder: Path, name: str = "emoji", weights: bytes = b"weights" * 100) -> Path:
    """A version made of small files under a real manifest; returns its folder."""
    plan = MixturePlan(
        budget=Budget("macs", 0.5, "ddim", 20),
        agent="era",
        seed=0,
        partition=Partition.from_boundaries([400], 1000),
        experts=(ArchitectureSpec({"mid": 4}), ArchitectureSpec({"mid": 8})),
        shares=(0.4, 0.6),
        expert_costs=(Cost(100, 10), Cost(100, 10)),
        dense_cost=Cost(200, 20),
        loss=0.1,
    )
    metrics = {"denoising_loss": 0.1, "paired_mse": 0.01, "paired_psnr_db": 20.0, "paired_ssim": 0.9, "ms_per_step": 3.0}
    manifest = MixtureManifest(
        name, "unet2d", plan, {"macs-0.50": metrics}, {}, Provenance(name, "f" * 64, "m", "a" * 64, "d", "b" * 64, 0, {}), {}
    )
    source = folder / "source"
    source.mkdir(exist_ok=True)
    (source / "weights.bin").write_bytes(weights)
    (source / "config.json").write_text("{}")
    return Registry(folder / "registry").publish(name, manifest, source).path


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_verify_counts_the_files_of_every_version(tmp_path):
    publish(tmp_path)
    publish(tmp_path, "other")
    done = diffpruning("registry", "verify", "--hashes-only")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{name}:1           ok, 2 files" for name in ("emoji", "other")]
    told = {"version": "other:1", "ok": True, "files": 2, "checks": ["hashes"]}
    assert json.loads(diffpruning("registry", "verify", "other", "--hashes-only", "--json").stdout) == [told]


def test_a_version_without_golden_samples_is_loaded_all_the_same(tmp_path):
    publish(tmp_path)
    done = diffpruning("registry", "verify")
    assert done.exit_code == 4 and done.stderr.startswith("error: emoji:1: cannot be loaded and sampled: ")


def test_verify_names_a_tampered_file_and_ends_with_4(tmp_path):
    folder = publish(tmp_path)
    publish(tmp_path, "other", b"others" * 100)
    overwrite(folder / "weights.bin", b"Weights" * 100)
    before = tree(tmp_path)
    done = diffpruning("registry", "verify", "--json", "--hashes-only")
    assert done.exit_code == 4
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: emoji:1: weights.bin: sha256 is ")
    emoji, other = json.loads(done.stdout)
    assert (emoji["version"], emoji["ok"]) == ("emoji:1", False)
    assert other == {"version": "other:1", "ok": True, "files": 2, "checks": ["hashes"]}
    assert tree(tmp_path) == before
    assert diffpruning("registry", "verify", "other", "--hashes-only").exit_code == 0


def test_a_tampered_manifest_is_named_and_ends_with_4(tmp_path):
    folder = publish(tmp_path)
    page = json.loads((folder / "manifest.json").read_text())
    overwrite(folder / "manifest.json", json.dumps(page | {"family": "unet3d"}).encode())
    done = diffpruning("registry", "verify", "emoji")
    assert done.exit_code == 4
    assert done.stderr.startswith("error: emoji:1: manifest.json: sha256 is ")


@pytest.mark.parametrize("command", [("list",), ("show", "emoji"), ("verify",)])
def test_a_version_that_lost_its_manifest_ends_with_4(tmp_path, command):
    folder = publish(tmp_path)
    folder.chmod(0o755)
    (folder / "manifest.json").unlink()
    done = diffpruning("registry", *command)
    assert done.exit_code == 4
    assert done.stderr.startswith("error: emoji:1: manifest.json: cannot be read: ")
    assert done.stderr.count("\n") == 1


def test_nothing_is_drawn_from_a_tampered_version(tmp_path):
    overwrite(publish(tmp_path) / "weights.bin", b"")
    line = line_of(diffpruning("sample", "emoji", "--out", tmp_path / "x.png"), 4)
    assert line.startswith("emoji:1: weights.bin: sha256 is ")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("emojis", "has no mixture emojis: it has emoji"),
        ("emoji:7", "emoji has no version '7': it has 1"),
        ("emoji:", "emoji has no version '': it has 1"),
        ("emoji@best", "emoji has no alias 'best': the only alias is latest"),
        ("../emoji", "mixture name '../emoji' is not "),
    ],
)
@pytest.mark.parametrize("command", [("sample",), ("registry", "show"), ("registry", "verify")], ids=" ".join)
def test_a_version_that_is_not_there_is_refused_with_those_there_are(tmp_path, command, reference, told):
    publish(tmp_path)
    before = tree(tmp_path)
    assert told in line_of(diffpruning(*command, reference), 2)
    assert tree(tmp_path) == before


def test_list_shows_the_other_versions_beside_a_damaged_one(tmp_path):
    folder = publish(tmp_path)
    publish(tmp_path, "other")
    overwrite(folder / "manifest.json", b"{")
    done = diffpruning("registry", "list")
    assert done.exit_code == 4
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["emoji:1", "damaged"], ["other:1", "macs-0.50"]]
    assert done.stderr.startswith("error: emoji:1: manifest.json: cannot be read: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("list",), ("list", "--json"), ("verify",)])
def test_a_registry_that_is_empty_or_not_there_is_no_list_of_nothing(tmp_path, command):
    told = line_of(diffpruning("registry", *command), 2)
    assert told == f"the registry {tmp_path}/registry has no mixture: it is empty or missing: publish a mixture first"
    assert "the registry /nowhere has no mixture: " in line_of(diffpruning("registry", *command, "--registry", "/nowhere"), 2)
    assert tree(tmp_path) == {}


def test_a_list_of_a_name_that_is_not_there_is_refused_with_those_there_are(tmp_path):
    publish(tmp_path)
    assert "has no mixture emojis: it has emoji" in line_of(diffpruning("registry", "list", "emojis"), 2)


def test_a_version_is_listed_and_shown(tmp_path):
    path = publish(tmp_path)
    [row] = json.loads(diffpruning("registry", "list", "--json").stdout)
    assert row == {
        "version": "emoji:1",
        "budget": "macs-0.50",
        "agent": "era",
        "experts": 2,
        "cost_ratio": 0.5,
        "of": "MACs",
        "macs_ratio": 0.5,
        "paired_mse": 0.01,
        "denoising_loss": 0.1,
        "path": str(path),
        "aliases": [],
    }
    assert diffpruning("registry", "list").stdout.splitlines()[1].split() == [
        "emoji:1",
        "macs-0.50",
        "era",
        "2",
        "0.500",
        "MACs",
        "0.01000",
    ]
    shown = json.loads(diffpruning("registry", "show", "emoji@latest", "--json").stdout)
    assert shown == json.loads((path / "manifest.json").read_text())
    assert diffpruning("registry", "show", "emoji:1").stdout.startswith(f"emoji:1  {path}\n")


def test_a_version_without_metrics_is_listed_too(tmp_path):
    folder = publish(tmp_path)
    manifest = dataclasses.replace(Registry(tmp_path / "registry").resolve("emoji").manifest(), metrics={}, name="bare")
    Registry(tmp_path / "registry").publish("bare", dataclasses.replace(manifest, files={}), folder.parents[2] / "source")
    done = diffpruning("registry", "list", "bare")
    assert done.stdout.splitlines()[1].split() == ["bare:1", "macs-0.50", "era", "2", "0.500", "MACs"]


@pytest.mark.parametrize(("out", "told"), [("gone/x.png", "--out: no such folder: gone"), (".", "--out: . is a folder")])
def test_a_place_that_cannot_hold_the_samples_is_refused(tmp_path, out, told):
    publish(tmp_path)
    assert told in line_of(diffpruning("sample", "emoji", "--out", out), 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--eta", "nan"), "nan is not a finite number"),
        (("--guidance-scale", "inf"), "inf is not a finite number"),
        (("--guidance-scale", "nan"), "nan is not a finite number"),
    ],
)
def test_what_is_no_number_is_refused(words, told):
    done = diffpruning("sample", "emoji", *words)
    assert done.exit_code == 2
    assert told in done.stderr


# --- status, report, plan, help ---------------------------------------------------------------------------------------


def test_status_and_report_of_a_job_that_never_ran_are_refused(tmp_path):
    assert line_of(diffpruning("status", "quickstart"), 2) == f"no run in {tmp_path / 'runs/quickstart'}: start it with `diffpruning run`"
    assert "analyze is not done" in line_of(diffpruning("report", "quickstart"), 2)
    assert tree(tmp_path) == {}


def test_status_shows_what_a_run_has_done(tmp_path, images):
    assert analyze(images).exit_code == 0
    by_folder = json.loads(diffpruning("status", "runs/quickstart", "--json").stdout)
    by_job = json.loads(diffpruning("status", "quickstart", "--json").stdout)
    for found in (by_folder, by_job):
        assert (found["job"], found["running"], found["units"], found["report"]) == ("quickstart", None, [], None)
        assert [stage["stage"] for stage in found["done"]] == ["analyze"]
    assert by_job["done"] == by_folder["done"]


STAGES = ["analyze", "partition", "specialize", "route", "finetune", "publish"]


def test_plan_prints_six_stages_and_writes_nothing(tmp_path):
    done = diffpruning("plan", "quickstart")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[-6:]] == [[stage, "new"] for stage in STAGES]
    [needs] = [line for line in lines if line.startswith("needs")]
    assert re.fullmatch(r"needs      up to 0\.\d+ GB of disk \([\d.]+ GB are free\); about 0\.\d+ GB of memory per trainer", needs)
    assert tree(tmp_path) == {}


def test_plan_as_json_is_one_document_and_writes_nothing(tmp_path):
    done = diffpruning("plan", "quickstart", "--json", *sets(QUICK))
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [stage["stage"] for stage in found["stages"]] == STAGES
    assert {stage["state"] for stage in found["stages"]} == {"new"}
    assert found["budgets"] == [{"metric": "macs", "ratio": 0.65}, {"metric": "macs", "ratio": 0.5}]
    assert found["data"]["images"] == 3583
    assert tree(tmp_path) == {}


def test_plan_tells_done_from_stale_and_new(images):
    assert analyze(images).exit_code == 0

    def states(*overrides: str) -> list[str]:
        found = diffpruning("plan", "quickstart", "--json", *sets((*QUICK, f"data.path={images}", *overrides)))
        return [stage["state"] for stage in json.loads(found.stdout)["stages"]]

    assert states() == ["done"] + ["new"] * 5
    assert states("finetune.steps=3", "similarity.bootstrap=7", "name=quickstart") == ["done"] + ["new"] * 5
    assert states("seed=1") == ["stale"] + ["new"] * 5


def test_only_before_its_turn_is_refused():
    assert refused(("run", "--inline", "--only", "route")) == "--only route: stage specialize is not done (new): run it first"


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "quickstart", "--only", "nothing"), ("fly", "quickstart"), ("plan", "quickstart", "--josn")]
)
def test_a_mistyped_command_ends_with_2(arguments, tmp_path):
    done = diffpruning(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert tree(tmp_path) == {}


def test_help_documents_every_exit_code():
    lines = diffpruning("--help").stdout.split("Exit codes:")[1].split("\n")
    assert [line.split()[0] for line in lines if line.strip()] == ["0", "1", "2", "3", "4", "130"]


@pytest.mark.parametrize(
    "command", ["plan", "run", "status", "report", "sample", "schema", "registry list", "registry show", "registry verify"]
)
def test_every_command_explains_itself(command):
    done = diffpruning(*command.split(), "--help")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) > 4


# --- in a process of its own ------------------------------------------------------------------------------------------


def own_process(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_real_process_says_one_line_and_no_library_joins_in(model):
    told = truncated_weights(model)
    command = own_process("run", "quickstart", "--inline", "--set", f"model.path={model}")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {told}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_is_not_done(tmp_path, heard, number):
    command = own_process("run", "quickstart", "--inline", "--only", "analyze", "--set", "similarity.images=2000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment(), start_new_session=True) as process:
        for line in process.stderr:
            if "analyze t" in line:
                break
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 130
        assert process.stdout.read() == ""
    assert rest.splitlines()[-1] == "interrupted: the same command continues where this one stopped"
    assert not list(tmp_path.glob("runs/quickstart/*/done.json"))
