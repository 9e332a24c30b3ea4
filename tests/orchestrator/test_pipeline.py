"""What "run the same command again" means: what is done stays done, a changed key makes the stages behind it stale, nothing is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config import JobConfig, load_job
from orchestrator.pipeline import Context, Pipeline, Stage
from orchestrator.store import RunStore, read_json, storage_error, write_json
from workers.contracts import InputError

ROOT = Path(__file__).parents[2]
OWNER = {"name": "toy", "model.path": "a-model", "data.path": "some-images"}
SETTINGS = {"seed": 0, "grow": {"by": 2, "times": 1}, "unread": 0}


class Toys:
    """Three stages, one after the other, that count how often they ran: start from the seed, grow it, tell it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ran: list[str] = []
        self.broken: set[str] = set()
        self.clusters = 0
        self.told: list[tuple[str, str]] = []
        self.stages = (
            Stage("start", self.start, (), ("seed", "data.path")),
            Stage("grow", self.grow, ("start",), ("grow",)),
            Stage("tell", self.tell, ("grow",), ()),
        )

    def enter(self, name: str, ctx: Context) -> None:
        self.ran.append(name)
        (ctx.folder / "half.txt").write_text("begun")
        if name in self.broken:
            raise RuntimeError(f"{name} broke")

    def start(self, ctx: Context) -> dict:
        self.enter("start", ctx)
        return {"value": ctx.job["seed"]}

    def grow(self, ctx: Context) -> dict:
        self.enter("grow", ctx)
        return {"value": ctx.results["start"]["value"] + ctx.job["grow"]["by"] * ctx.job["grow"]["times"]}

    def tell(self, ctx: Context) -> dict:
        self.enter("tell", ctx)
        assert (ctx.folder_of("grow") / "half.txt").exists()
        return {"value": f"it is {ctx.results['grow']['value']}"}

    def pipeline(self, settings: dict = SETTINGS, data: str = "images-1") -> Pipeline:
        return Pipeline(self.stages, settings, {"data.path": data}, RunStore(self.folder))

    def run(self, settings: dict = SETTINGS, data: str = "images-1", **how) -> dict:
        """The results; what ran is in ``ran`` afterwards."""
        self.ran.clear()
        self.told.clear()

        def cluster() -> object:
            self.clusters += 1
            return SimpleNamespace(calls=[])

        def on_stage(name: str, state: str, seconds: float) -> None:
            self.told.append((name, state))

        return self.pipeline(settings, data).run(settings, cluster, lambda text: None, on_stage=on_stage, **how)


@pytest.fixture
def toys(tmp_path):
    folder = tmp_path / "runs" / "toy"
    RunStore(folder).claim(OWNER)
    return Toys(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(**values) -> dict:
    return {**SETTINGS, **values}


def test_what_killed_processes_left_half_written_is_gone_after_the_next_run(toys, tmp_path):
    toys.run()
    half = ["cache/images-x.arrow.host-7.tmp", "train/grow-x/.step_0000005.ab12.tmp/state", "start-x/.embed.7.tmp.npy"]
    alive = f".report.{os.getpid()}.tmp.html"
    for name in [*half, ".progress.999999999.tmp.json", alive, "start-x/kept.npy"]:
        (toys.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (toys.folder / name).write_text("half")
    toys.broken.add("tell")
    with pytest.raises(RuntimeError), toys.pipeline().store.lock():
        toys.run(changed(unread=1, grow={"by": 5, "times": 1}))
    left = {path.name for path in toys.folder.rglob("*") if ".tmp" in path.name}
    assert left == {alive}
    assert (toys.folder / "start-x" / "kept.npy").exists()


# --- what is done, what is stale --------------------------------------------------------------------------------------


def test_stages_run_in_order_on_one_cluster_and_pass_their_results_on(toys):
    assert toys.run() == {"start": {"value": 0}, "grow": {"value": 2}, "tell": {"value": "it is 2"}}
    assert toys.ran == ["start", "grow", "tell"]
    assert toys.clusters == 1


def test_done_stages_are_skipped_and_nobody_asks_for_a_cluster(toys):
    first, files = toys.run(), tree(toys.folder)
    assert toys.run() == first
    assert toys.ran == []
    assert toys.clusters == 1
    assert toys.told == [("start", "already done"), ("grow", "already done"), ("tell", "already done")]
    assert tree(toys.folder) == files


@pytest.mark.parametrize(
    ("settings", "data", "ran"),
    [
        (changed(unread=1), "images-1", []),
        (changed(grow={"by": 2, "times": 5}), "images-1", ["grow", "tell"]),
        (changed(seed=1), "images-1", ["start", "grow", "tell"]),
        (SETTINGS, "images-2", ["start", "grow", "tell"]),
    ],
)
def test_a_change_makes_exactly_the_stages_behind_it_stale(toys, settings, data, ran):
    toys.run()
    states = toys.pipeline(settings, data).states()
    assert states == {name: "stale" if name in ran else "done" for name in ("start", "grow", "tell")}
    toys.run(settings, data)
    assert toys.ran == ran


def test_changing_a_setting_back_finds_the_old_work(toys):
    first = toys.run()
    other = toys.run(changed(seed=7))
    assert other["tell"] == {"value": "it is 9"}
    assert toys.run() == first
    assert toys.ran == []
    assert toys.run(changed(seed=7)) == other
    assert toys.ran == []


def test_a_stage_whose_meaning_changed_runs_again(toys):
    toys.run()
    start, grow, tell = toys.stages
    toys.stages = (start, Stage(grow.name, grow.run, grow.needs, grow.reads, version=2), tell)
    toys.run()
    assert toys.ran == ["grow", "tell"]


def test_work_from_before_there_was_a_setting_is_good_until_it_has_another_value(toys):
    toys.run()
    start, grow, tell = toys.stages
    toys.stages = (start, Stage(grow.name, grow.run, grow.needs, grow.reads, later={"unread": 0}), tell)
    toys.run()
    assert toys.ran == []
    toys.run(changed(unread=1))
    assert toys.ran == ["grow", "tell"]


def test_a_later_setting_within_a_section_that_is_read_whole_counts_by_its_value_alone(toys):
    store = toys.pipeline().store

    def fingerprint(section: dict[str, int], **more: Any) -> str:
        stage = Stage("start", toys.stages[0].run, (), ("section",), **more)
        return Pipeline([stage], {"section": section}, {}, store).fingerprints["start"]

    before, later = fingerprint({"old": 1}), {"section.new": 0}
    assert fingerprint({"old": 1, "new": 0}, later=later) == before
    assert len({before, fingerprint({"old": 1, "new": 2}, later=later), fingerprint({"old": 2, "new": 0}, later=later)}) == 3


def test_states_of_a_run_that_never_was_are_new_and_looking_creates_nothing(tmp_path):
    toys = Toys(tmp_path / "runs" / "toy")
    assert toys.pipeline().states() == {"start": "new", "grow": "new", "tell": "new"}
    assert not toys.folder.parent.exists()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_stage_that_failed_is_not_done_and_the_same_command_continues_with_it(toys):
    toys.broken = {"grow"}
    with pytest.raises(RuntimeError, match="grow broke"):
        toys.run()
    assert toys.ran == ["start", "grow"]
    assert toys.pipeline().states() == {"start": "done", "grow": "partial", "tell": "new"}
    toys.broken.clear()
    assert toys.run()["tell"] == {"value": "it is 2"}
    assert toys.ran == ["grow", "tell"]


def test_a_cluster_that_cannot_be_had_leaves_no_trace_of_a_stage(toys):
    def no_cluster():
        raise InputError("it never fits")

    with pytest.raises(InputError, match="never fits"):
        toys.pipeline().run(SETTINGS, no_cluster, lambda text: None)
    assert toys.pipeline().states() == {"start": "new", "grow": "new", "tell": "new"}


def test_a_done_record_cut_in_half_is_told_in_one_line_with_the_file_and_the_way_out(toys):
    toys.run()
    [record] = toys.folder.glob("grow-*/done.json")
    record.write_bytes(record.read_bytes()[:60])
    with pytest.raises(InputError) as refused:
        toys.run()
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).startswith(f"{record} is damaged (")
    assert "delete it" in str(refused.value)
    record.unlink()
    assert toys.run()["tell"] == {"value": "it is 2"}
    assert toys.ran == ["grow"]  # what it makes again has the same fingerprint, so that what comes after still holds


def test_a_done_record_of_another_fingerprint_does_not_count(toys):
    toys.run()
    [record] = toys.folder.glob("grow-*/done.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "0" * 64}))
    toys.run()
    assert toys.ran == ["grow"]


# --- --only and --redo ------------------------------------------------------------------------------------------------


def test_only_runs_one_stage_once_those_before_it_are_done(toys):
    assert toys.run(only="start") == {"start": {"value": 0}}
    assert toys.run(only="grow")["grow"] == {"value": 2}
    assert toys.ran == ["grow"]


@pytest.mark.parametrize(
    ("before", "only", "told"),
    [(None, "grow", "stage start is not done (new)"), ("start", "tell", "stage grow is not done (new)")],
)
def test_only_is_refused_when_a_stage_before_it_is_missing(toys, before, only, told):
    if before:
        toys.run(only=before)
    files = tree(toys.folder)
    with pytest.raises(InputError) as refused:
        toys.run(only=only)
    assert str(refused.value) == f"--only {only}: {told}: run it first"
    assert toys.ran == []
    assert tree(toys.folder) == files


def test_until_runs_the_stages_up_to_one_and_leaves_the_rest(toys):
    assert set(toys.run(until="grow")) == {"start", "grow"}
    assert toys.ran == ["start", "grow"]
    toys.run()
    assert toys.ran == ["tell"]


def test_only_is_refused_when_a_stage_before_it_is_stale(toys):
    toys.run()
    with pytest.raises(InputError, match=r"stage start is not done \(stale\)"):
        toys.run(changed(seed=1), only="grow")


def test_redo_makes_a_stage_and_those_behind_it_again_and_deletes_nothing(toys):
    first = toys.run()
    files = tree(toys.folder)
    assert toys.run(redo=["grow"]) == first
    assert toys.ran == ["grow", "tell"]
    after = tree(toys.folder)
    kept = {name.replace(".aside1", ""): content for name, content in after.items() if ".aside1" in name}
    assert kept == {name: content for name, content in files.items() if name.startswith(("grow-", "tell-"))}
    assert {name: content for name, content in after.items() if name.startswith("start-")} == {
        name: content for name, content in files.items() if name.startswith("start-")
    }


def test_redo_twice_keeps_both(toys):
    toys.run()
    toys.run(redo=["tell"])
    toys.run(redo=["tell", "grow"])
    assert toys.ran == ["grow", "tell"]
    folders = sorted(path.name.partition(".")[2] for path in toys.folder.glob("tell-*"))
    assert folders == ["", "aside1", "aside2"]


def leaving(toys) -> None:
    """From now on grow leaves a trainer, named by how much it grows, beside its own folder."""
    start, grow, tell = toys.stages

    def run(ctx: Context) -> dict:
        name = f"train/grow-{ctx.job['grow']['by']}"
        (ctx.store.folder / name).mkdir(parents=True, exist_ok=True)
        (ctx.store.folder / name / "state").write_text(name)
        return {**toys.grow(ctx), "left": [name]}

    toys.stages = (start, Stage("grow", run, grow.needs, grow.reads, leaves=lambda result: result["left"]), tell)


def test_redo_sets_aside_what_the_stage_left_elsewhere_too(toys):
    leaving(toys)
    toys.run(changed(grow={"by": 5, "times": 1}))
    toys.run()
    mine, other = toys.folder / "train" / "grow-2", toys.folder / "train" / "grow-5"
    toys.run(redo=["grow"], only="grow")
    assert mine.exists(), "made again"
    assert (mine.with_name("grow-2.aside1") / "state").read_text() == "train/grow-2"
    assert not other.with_name("grow-5.aside1").exists()
    assert toys.pipeline(changed(grow={"by": 5, "times": 1})).states()["grow"] == "done"


def test_redo_leaves_no_result_of_other_settings_that_points_to_what_was_set_aside(toys):
    leaving(toys)
    shared = changed(grow={"by": 2, "times": 7})
    toys.run(shared)
    toys.run()
    assert {path.name for path in (toys.folder / "train").iterdir()} == {"grow-2"}, "both use one trainer"
    toys.broken = {"grow"}
    with pytest.raises(RuntimeError):
        toys.run(redo=["grow"])
    assert toys.pipeline(shared).states()["grow"] == "new"
    toys.broken.clear()
    assert toys.run(shared)["grow"] == {"value": 14, "left": ["train/grow-2"]}


def test_redo_of_something_that_was_never_made_just_runs(toys):
    assert toys.run(redo=["start"])["tell"] == {"value": "it is 2"}


def test_only_with_redo_of_the_same_stage_leaves_the_later_ones_to_be_made_again(toys):
    toys.run()
    toys.run(redo=["grow"], only="grow")
    assert toys.ran == ["grow"]
    assert toys.pipeline().states() == {"start": "done", "grow": "done", "tell": "new"}


def test_only_with_redo_of_a_stage_before_it_is_refused_before_anything_is_moved(toys):
    toys.run()
    files = tree(toys.folder)
    with pytest.raises(InputError, match=r"stage grow is not done \(to be made again\)"):
        toys.run(redo=["start"], only="tell")
    assert tree(toys.folder) == files


# --- the real stages: which keys do they read? ------------------------------------------------------------------------

ALL = ("analyze", "partition", "specialize", "route", "finetune", "publish")
FROM = {stage: ALL[i:] for i, stage in enumerate(ALL)}
# A section, or one key of it where that differs from the rest, and the first stage that it makes stale.
FIRST_STALE = {
    "name": "publish",
    "seed": "analyze",
    "storage": None,
    "registry": "publish",
    "model": None,  # the identity of the weights counts, not where they lie
    "data.path": None,
    "data.on_error": "analyze",
    "data.resize": "analyze",
    "data.holdout": "analyze",
    "data.flip": "specialize",
    "data.class_dropout": "specialize",
    "data.latent_dtype": "analyze",
    "data.encode_math": "analyze",
    "data.encode_batch": None,  # changes latents by rounding only
    "similarity": "analyze",
    "similarity.bootstrap": "partition",
    "partition": "partition",
    "elastic": "specialize",
    "specialize": "specialize",
    "specialize.checkpoint_every": None,  # how often, not what
    "finetune.checkpoint_every": None,
    "evaluate.batch_size": None,
    "evaluate.shards": None,
    "router": "route",
    "budgets": "route",
    "sampler": "route",
    "sampler.guidance_scale": "route",
    "sampler.eta": "publish",
    "sampler.epsilon_scale": "publish",
    "model.random_init": None,
    "latency": "publish",
    "export": "publish",
    "finetune": "finetune",
    "finetune.compare": "route",  # its agents have to search
    "evaluate": "publish",
    "resources": None,
}


def leaf_keys(values: dict, place: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found += leaf_keys(value, f"{place}{name}.") if isinstance(value, dict) else [f"{place}{name}"]
    return found


JOB = load_job("quickstart").model_dump(mode="json")


def fingerprints(settings: dict, model: str = "m", data: str = "d", first_stage: str = "f", timing: str = "") -> dict[str, str]:
    from orchestrator.stages import STAGES

    return Pipeline(
        STAGES, settings, {"model": model, "data.path": data, "first_stage": first_stage, "timing": timing}, RunStore(Path("nowhere"))
    ).fingerprints


def differing(settings: dict, **identity: str) -> list[str]:
    before, after = fingerprints(JOB), fingerprints(settings, **identity)
    assert list(before) == list(ALL)
    return [name for name in before if before[name] != after[name]]


def another(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else [*value, "x"] if isinstance(value, list) else 1


@pytest.mark.parametrize("key", leaf_keys(JOB))
def test_a_changed_key_of_the_job_makes_exactly_the_right_stages_stale(key):
    settings = json.loads(json.dumps(JOB))
    *parents, last = key.split(".")
    here = settings
    for part in parents:
        here = here[part]
    here[last] = another(here[last])
    first = FIRST_STALE.get(key, FIRST_STALE.get(key.partition(".")[0]))
    assert differing(settings) == list(FROM.get(first, ()))


def test_every_section_of_the_job_is_placed():
    assert {key.partition(".")[0] for key in FIRST_STALE} == set(JobConfig.model_fields)


@pytest.mark.parametrize("identity", [{"model": "other"}, {"data": "other"}, {"first_stage": "other"}])
def test_another_model_or_other_images_make_everything_stale(identity):
    assert differing(JOB, **identity) == list(ALL)


def test_under_what_time_is_measured_counts_where_it_is_the_budget():
    assert differing(JOB, timing="compiled") == list(FROM["route"])


def test_the_names_of_the_command_are_those_of_the_stages():
    from orchestrator.cli_options import STAGE_NAMES
    from orchestrator.stages import STAGES

    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES == ALL


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_stays_as_it_is(tmp_path):
    store = RunStore(tmp_path / "a" / "b")
    store.claim(OWNER)
    before = (store.folder / "run.json").stat().st_mtime_ns
    store.claim(OWNER)
    assert (store.folder / "run.json").stat().st_mtime_ns == before
    assert read_json(store.folder / "run.json") == {"schema": 1, **OWNER}


@pytest.mark.parametrize("key", list(OWNER))
def test_a_folder_of_another_job_is_refused_with_what_differs(tmp_path, key):
    RunStore(tmp_path / "run").claim(OWNER)
    files = tree(tmp_path)
    with pytest.raises(InputError) as refused:
        RunStore(tmp_path / "run").claim(OWNER | {key: "mine"})
    assert f"holds the run of another job ({key} {OWNER[key]}, this job has mine)" in str(refused.value)
    assert tree(tmp_path) == files


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        RunStore(tmp_path).claim(OWNER)
    assert tree(tmp_path) == {"thesis.tex": b"precious"}


def test_an_empty_folder_and_one_with_a_killed_claim_can_be_claimed(tmp_path):
    (tmp_path / ".run.json.12345.tmp").write_text("{")
    RunStore(tmp_path).claim(OWNER)
    assert read_json(tmp_path / "run.json") == {"schema": 1, **OWNER}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert tree(tmp_path) == {"a.json": b'{\n "x": 1\n}\n'}
    assert read_json(tmp_path / "b.json") is None


def test_a_full_disk_is_told_in_one_line_and_a_bug_is_not_taken_for_one():
    told = storage_error(OSError(errno.ENOSPC, "No space left on device", "runs/x"))
    assert told is not None
    assert told.startswith("cannot write to runs/x: No space left on device: make room")
    assert storage_error(PermissionError(errno.EACCES, "Permission denied", "runs/x")) == "no access to runs/x: Permission denied"
    assert storage_error(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


HOLD = """
import sys, time
from pathlib import Path
from orchestrator.store import RunStore
with RunStore(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_until_the_first_is_gone_even_by_kill(tmp_path):
    store = RunStore(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another diffpruning is running in"), store.lock():
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with store.lock(), pytest.raises(InputError, match="another diffpruning is running in"), store.lock():
        pass
    with store.lock():
        pass
