"""`diffpruning profile`: measures, prints, stores where runs look, and finds its table again. Real speed is never asserted."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from orchestrator.cli import Command, main
from orchestrator.cli_profile import profile
from workers import latency
from workers.contracts import InputError, Timing
from workers.latency_table import LatencyTable

SETS = ("elastic.most_widths=2", "elastic.width_multiple=64", "storage.path=runs", "registry.path=registry")
measure = latency.measure
commands = Command("diffpruning", commands={"profile": profile})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """One visit and two checked networks are enough to see what becomes of a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "FEWEST_NETWORKS", 1)
    monkeypatch.setattr(latency, "measure", functools.partial(measure, visits=1, validation_networks=2))


def run(*arguments: str, group=commands, command: str = "profile") -> Result:
    sets = [word for value in SETS for word in ("--set", value)]
    return CliRunner().invoke(group, [command, "quickstart", *sets, *arguments], catch_exceptions=False)


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def stored(folder: str = "runs/quickstart/cache") -> list[Path]:
    return sorted(Path(folder).glob("latency-*.json"))


def never(*_, **__):
    raise AssertionError("measured again")


def test_it_prints_and_stores_a_table_that_the_next_call_and_the_job_s_runs_find(monkeypatch):
    first = run("--device", "cpu", "--batch", "1,2", "--dtype", "float32")
    assert first.exit_code == 0, first.output
    assert len(stored()) == 2
    for path in stored():
        table = LatencyTable.load(path)
        assert str(path.resolve()) in first.stdout
        assert f"{table.dense_ms:.3f}" in first.stdout
        assert f"{table.validation.median_error:.1%}" in first.stdout
        assert f"{table.validation.p95_error:.1%}" in first.stdout
        assert f"share of the dense time, batch {table.identity.batch}" in first.stdout
    assert "step" in first.stderr
    monkeypatch.setattr(latency, "measure", never)
    again = run("--device", "cpu", "--batch", "1,2", "--dtype", "float32")
    assert again.stdout == first.stdout
    assert "step" not in again.stderr
    assert run(group=main, command="plan").exit_code == 0


def test_json_holds_the_same(tmp_path):
    result = run("--device", "cpu", "--batch", "2", "--out", "tables", "--json")
    [row] = json.loads(result.stdout)
    table = LatencyTable.load(Path(row["table"]))
    assert stored("tables") == [Path("tables") / Path(row["table"]).name]
    assert not Path("runs").exists()
    assert row["identity"] == table.identity.to_json()
    assert (row["dense_ms"], row["fastest_ms"]) == (table.dense_ms, table.predict(table.fastest))
    assert row["validation"]["networks"] == 2
    assert sum(row["shares"].values()) == pytest.approx(1)


def test_a_table_of_another_device_is_refused_with_what_differs():
    run("--device", "cpu", "--batch", "1", "--out", "tables")
    [path] = stored("tables")
    table = LatencyTable.load(path)
    dataclasses.replace(table, identity=dataclasses.replace(table.identity, device="NVIDIA H200")).save(path)
    told = refused("--device", "cpu", "--batch", "1", "--out", "tables")
    assert "measured elsewhere: device is NVIDIA H200, wanted " in told


@pytest.mark.parametrize(("error", "warned"), [(0.02, False), (0.4, True)])
def test_a_prediction_that_is_far_off_is_told(error, warned):
    run("--device", "cpu", "--batch", "1", "--out", "tables")
    [path] = stored("tables")
    table = LatencyTable.load(path)
    dataclasses.replace(table, validation=dataclasses.replace(table.validation, median_error=error)).save(path)
    result = run("--device", "cpu", "--batch", "1", "--out", "tables")
    assert result.exit_code == 0
    assert (f"delete {path.resolve()} to measure again" in result.stderr) == warned


@pytest.mark.parametrize("batch", ["0", "1,x", "", "1;8", "-1"])
def test_a_batch_that_is_no_number_of_images_is_refused(batch):
    assert f"--batch {batch!r} is not a list of numbers of images" in refused("--batch", batch)
    assert not Path("runs").exists()


def test_a_file_is_no_folder_for_tables():
    Path("file").write_text("")
    assert "--out: file is a file; give a folder" in refused("--batch", "1", "--device", "cpu", "--out", "file")


@pytest.mark.parametrize("asked", [("--cuda-graphs",), ("--set", "latency.cuda_graphs=true")])
def test_cuda_graphs_of_a_cpu_are_refused_before_anything_is_written(asked):
    told = refused("--device", "cpu", *asked)
    assert told == "error: latency.cuda_graphs is true, but the device is cpu: set it to false\n"
    assert not Path("runs").exists()


def test_cuda_graphs_of_the_job_can_be_left_out_of_a_profile():
    result = run("--device", "cpu", "--batch", "1", "--set", "latency.cuda_graphs=true", "--no-cuda-graphs", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["identity"]["cuda_graphs"] is False


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_job_for_the_cpu_that_asks_for_cuda_graphs_is_refused(command):
    sets = ("--set", "latency.cuda_graphs=true", "--set", "resources.device=cpu")
    result = run(*sets, group=main, command=command)
    assert result.exit_code == 2
    assert result.stderr == "error: latency.cuda_graphs is true, but the device is cpu: set it to false\n"
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_job_for_any_device_that_asks_for_cuda_graphs_is_refused_where_there_is_no_gpu():
    result = run("--set", "latency.cuda_graphs=true", "--inline", group=main, command="run")
    assert result.exit_code == 2, result.output
    assert result.stderr.endswith("error: latency.cuda_graphs is true, but the device is cpu: set it to false\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert "--device is cuda, but this machine has no usable GPU" in refused("--device", "cuda")


def test_fused_kernels_are_refused_on_a_cpu_and_beside_a_compiler_before_anything_is_written():
    told = refused("--set", "latency.fused_kernels=true", "--device", "cpu")
    assert told == "error: latency.fused_kernels is true, but the device is cpu: set it to false\n"
    assert not Path("runs").exists()
    with pytest.raises(InputError, match="set one to false"):
        Timing(1, "float32", compiled=True, fused_kernels=True).check("cuda")
