"""What a job file may say, and how a mistake in it is told: one line that names the key."""

import dataclasses
import json

import jsonschema
import pytest
import yaml

from orchestrator.config import Elastic, Finetune, JobConfig, Router, Specialize, Training, job_schema, load_job
from orchestrator.job_file import BUNDLED, find_job
from workers.contracts import ElasticSettings, InputError, RouteSettings, TrainSettings

JOB = {"name": "small", "model": {"path": "a-model"}, "data": {"path": "some-images"}, "budgets": [{"ratio": 0.5}]}


@pytest.fixture
def write(tmp_path):
    """Write a job file: text, or values laid over a smallest job."""

    def write(content: str | dict, name: str = "job.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def refusal(job, *overrides: str) -> str:
    with pytest.raises(InputError) as refused:
        load_job(str(job), overrides)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert refused.value.exit_code == 2
    return message


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("speciallize.steps=3", "unknown key speciallize: did you mean specialize?"),
        ("specialize.stepz=3", "unknown key specialize.stepz: did you mean steps?"),
        ("specialize.learningrate=3", "unknown key specialize.learningrate: did you mean learning_rate?"),
        ("budgets.0.metrik=macs", "unknown key budgets.0.metrik: did you mean metric?"),
        ("sampler.qqq=3", "unknown key sampler.qqq; known: scheduler, steps"),
        ("zzzzz=3", "unknown key zzzzz; known: name, seed, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override, told):
    assert told in refusal("quickstart", override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("specialize.steps=many", "specialize.steps is 'many': must be a valid integer"),
        ("specialize.steps=1.5", "specialize.steps is 1.5: must be a valid integer"),
        ("specialize.steps=true", "specialize.steps is True: true and false are not among its values"),
        ("finetune.learning_rate=on", "finetune.learning_rate is True: true and false are not among its values"),
        ("data.flip=maybe", "data.flip is 'maybe': must be a valid boolean"),
        ("data.on_error=ignore", "data.on_error is 'ignore': must be 'refuse' or 'skip'"),
        ("name=3", "name is 3: must be a valid string"),
        ("data.path=", "data.path is None: must be a valid string"),
        ("model=5", "model is 5: must be a mapping of keys to values"),
        ("similarity=", "similarity is None: must be a mapping of keys to values"),
        ("budgets=0.5", "budgets is 0.5: must be a valid list"),
        ("budgets=[0.5]", "budgets.0 is 0.5: must be a mapping of keys to values"),
        ("router.agents=era", "router.agents is 'era': must be a valid list"),
        ("partition.experts=three", "partition.experts is 'three': must be 'auto', or must be a valid integer"),
        ("partition.experts=[200, x]", "partition.experts.1 is 'x': must be a valid integer"),
        ("partition.experts=true", "partition.experts is True"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(override, told):
    assert told in refusal("quickstart", override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("budgets.0.ratio=0", "budgets.0.ratio is 0: must be greater than 0"),
        ("budgets.0.ratio=1.5", "budgets.0.ratio is 1.5: must be less than or equal to 1"),
        ("budgets.1.ratio=-1", "budgets.1.ratio is -1: must be greater than 0"),
        ("budgets.0.ratio=.nan", "budgets.0.ratio is nan: must be a finite number"),
        ("budgets.0.ratio=.inf", "budgets.0.ratio is inf: must be a finite number"),
        ("budgets.0.metric=energy", "budgets.0.metric is 'energy': must be 'macs' or 'latency'"),
        ("latency.batch=0", "latency.batch is 0: must be greater than or equal to 1"),
        ("latency.dtype=int8", "latency.dtype is 'int8': must be 'float32', 'bfloat16' or 'float16'"),
        ("elastic.unit=layer", "elastic.unit is 'layer': must be 'group' or 'channel_per_group'"),
        ("export.rewrites=[shrink]", "export.rewrites 'shrink' is unknown: known are fold_context"),
        ("sampler.guidance_scale=-1", "sampler.guidance_scale is -1: must be greater than or equal to 0"),
        ("budgets=[]", "budgets is []: "),
        ("partition.experts=0", "partition.experts is 0: "),
        ("specialize.steps=-1", "specialize.steps is -1: must be greater than or equal to 0"),
        ("partition.method=thirds", "partition.method is 'thirds': must be"),
        ("finetune.steps=0", "finetune.steps is 0: must be greater than or equal to 1"),
        ("specialize.ema_decay=1", "specialize.ema_decay is 1: must be less than 1"),
        ("finetune.outside_fraction=1.01", "finetune.outside_fraction is 1.01: must be less than or equal to 1"),
        ("finetune.learning_rate=0", "finetune.learning_rate is 0: must be greater than 0"),
        ("seed=-1", "seed is -1: must be greater than or equal to 0"),
        ("router.agents=[]", "router.agents is []: "),
        ("resources.local_cpus=0", "resources.local_cpus is 0: must be greater than or equal to 1"),
        ("storage.path=''", "storage.path is '': "),
    ],
)
def test_a_value_out_of_range_is_refused(override, told):
    assert told in refusal("quickstart", override)


@pytest.mark.parametrize("name", ["My Job", "../up", "a/b", ".hidden", "-x", "", "a" * 65, "naïve", "a\nb", "a\n"])
def test_a_name_that_could_not_be_a_folder_is_refused(name):
    assert f"name is {name!r}: " in refusal("quickstart", f"name={json.dumps(name)}")


@pytest.mark.parametrize("name", ["a", "7", "a.b_c-d", "a" * 64])
def test_a_name_that_can_be_a_folder_is_accepted(name):
    assert load_job("quickstart", [f"name='{name}'"]).name == name


@pytest.mark.parametrize("missing", ["name", "model", "data", "budgets"])
def test_a_missing_key_is_named(write, missing):
    path = write({key: value for key, value in JOB.items() if key != missing})
    assert refusal(path) == f"job.yaml: missing key {missing}"


def test_a_missing_key_of_a_section_is_named(write):
    assert refusal(write(JOB | {"model": {}, "budgets": [{"metric": "macs"}]})) == (
        "job.yaml: missing key model.path; missing key budgets.0.ratio"
    )


def test_every_mistake_is_told_at_once(write):
    told = refusal(write(JOB | {"sed": 1, "sampler": {"steps": 0}}))
    assert "unknown key sed: did you mean seed?" in told
    assert "sampler.steps is 0: " in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("router.agents=[era, ear]", "router.agents 'ear' is unknown: known are era, evolution, greedy, knapsack, stitch, uniform"),
        ("similarity.measure=psnr", "similarity.measure 'psnr' is unknown: known are gradient, snr"),
        ("model.family=vae", "model.family 'vae' is unknown: known are unet2d"),
        ("similarity.measure=__init__", "similarity.measure '__init__' is unknown"),
        ("router.agents=[../era]", "router.agents '../era' is unknown"),
    ],
)
def test_an_unknown_extension_is_refused_with_those_there_are(override, told):
    # other files of the folder may have come since: their names lie between the known ones
    message = refusal("quickstart", override)
    start, colon, known = told.partition(": known are ")
    assert message.startswith(start + ": known are ")
    assert not colon or set(known.split(", ")) <= set(message.partition(": known are ")[2].split(", "))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("router.agents=[era, era]", "router.agents ['era', 'era'] names one twice"),
        ("router.seeds=[1, 2, 1]", "router.seeds [1, 2, 1] names one twice"),
        ("budgets=[{ratio: 0.5}, {ratio: 0.5}]", "budgets: macs-0.50, macs-0.50: two have the same name"),
        ("budgets=[{ratio: 0.5}, {ratio: 0.501}]", "budgets: macs-0.50, macs-0.50: two have the same name"),
    ],
)
def test_duplicates_are_refused(override, told):
    assert told in refusal("quickstart", override)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [1\nb: ]", "is not YAML: "),
        ("- a\n- b", "a job is a mapping of keys to values, not list"),
        ("", "a job is a mapping of keys to values, not NoneType"),
        ("name: !!python/object:os.system x", "is not YAML: "),
    ],
)
def test_a_file_that_is_no_job_is_refused_by_name(write, text, told):
    path = write(text)
    message = refusal(path)
    assert told in message
    assert str(path) in message


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00name")
    assert f"{tmp_path / 'job.yaml'} cannot be read: " in refusal(tmp_path / "job.yaml")


def test_a_job_that_is_not_there_is_refused_with_the_bundled_ones(tmp_path):
    message = refusal(tmp_path / "gone.yaml")
    assert message.startswith(f"no such job file: {tmp_path / 'gone.yaml'}; bundled jobs: ")
    assert "quickstart" in message


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_bundled_job_is_found_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_job(name) == BUNDLED / "quickstart.yaml"
    assert load_job(name).name == "quickstart"


def test_a_file_here_goes_before_a_bundled_job_of_the_same_name(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(JOB, "quickstart.yaml")
    assert load_job("quickstart.yaml").name == "small"


def test_a_path_below_a_folder_never_means_a_bundled_job(tmp_path):
    assert "no such job file" in refusal(tmp_path / "quickstart")


def test_a_bare_no_is_a_word_where_no_is_meant(write):
    config = load_job(str(write(yaml.safe_dump(JOB) + "specialize:\n  mixed_precision: no\n")))
    assert config.specialize.mixed_precision == "no"


def test_a_learning_rate_may_be_written_without_a_point(write):
    assert load_job(str(write(yaml.safe_dump(JOB) + "finetune: {learning_rate: 5e-4}\n"))).finetune.learning_rate == 5e-4


# --- --set ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("specialize.steps=7", "specialize.steps", 7),
        (" specialize.steps =7", "specialize.steps", 7),
        ("budgets.1.ratio=0.25", "budgets.1.ratio", 0.25),
        ("router.seeds=[3, 4]", "router.seeds", [3, 4]),
        ("budgets.1={ratio: 0.2}", "budgets.1.ratio", 0.2),
        ("partition.experts=[250, 500]", "partition.experts", [250, 500]),
        ("partition.experts=auto", "partition.experts", "auto"),
        ("resources.local_cpus=", "resources.local_cpus", None),
        ("storage.path=a=b", "storage.path", "a=b"),
        ("elastic={width_multiple: 32, depth: false}", "elastic.width_multiple", 32),
        ("elastic={width_multiple: 32, depth: false}", "elastic.importance", "taylor"),
        ("specialize.mixed_precision=no", "specialize.mixed_precision", "no"),
    ],
)
def test_set_reaches_every_depth_and_reads_yaml(override, section, expected):
    value = load_job("quickstart", [override]).model_dump()
    for part in section.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    assert value == expected


def test_the_last_set_wins_and_the_rest_of_the_section_stays():
    before = load_job("quickstart")
    after = load_job("quickstart", ["specialize.steps=7", "specialize.steps=8"])
    assert after.specialize == before.specialize.model_copy(update={"steps": 8})
    assert after.finetune == before.finetune


def test_set_makes_a_section_that_the_file_does_not_have(write):
    assert load_job(str(write(JOB)), ["sampler.steps=7"]).sampler.steps == 7


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("noequals", "--set 'noequals' is not of the form key.subkey=value"),
        ("=3", "--set '=3' is not of the form key.subkey=value"),
        ("name=[1", "--set name: '[1' is not a YAML value"),
        ("name.x=1", "--set name.x: name has no part 'x'"),
        ("name.x.y=1", "--set name.x.y: name has no part 'x'"),
        ("budgets.2.ratio=0.4", "--set budgets.2.ratio: budgets has no part '2'"),
        ("budgets.2=0.4", "--set budgets.2: budgets has no part '2'"),
        ("budgets.-1.ratio=0.4", "--set budgets.-1.ratio: budgets has no part '-1'"),
        ("budgets.ratio=0.4", "--set budgets.ratio: budgets has no part 'ratio'"),
    ],
)
def test_a_malformed_set_is_refused(override, told):
    assert refusal("quickstart", override) == told


# --- paths ----------------------------------------------------------------------------------------------------------


def test_paths_in_a_file_are_relative_to_that_file(tmp_path, monkeypatch, write):
    (tmp_path / "jobs" / "a-model").mkdir(parents=True)
    (tmp_path / "jobs" / "some-images").mkdir()
    (tmp_path / "elsewhere" / "a-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_job(str(write(JOB, "jobs/job.yaml")))
    assert config.model.path == str(tmp_path / "jobs" / "a-model")
    assert config.data.path == str(tmp_path / "jobs" / "some-images")


def test_paths_of_set_are_relative_to_the_current_folder(tmp_path, monkeypatch, write):
    for folder in ("jobs/a-model", "here/a-model", "here/some-images"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    config = load_job(str(write(JOB, "jobs/job.yaml")), ["model.path=a-model", "data.path=some-images"])
    assert config.model.path == str(tmp_path / "here" / "a-model")
    assert config.data.path == str(tmp_path / "here" / "some-images")


def test_a_hub_name_stays_what_it_is(write):
    path = write(JOB | {"model": {"path": "google/ddpm-cifar10-32"}, "data": {"path": "hf://datasets/org/images"}})
    config = load_job(str(path))
    assert (config.model.path, config.data.path) == ("google/ddpm-cifar10-32", "hf://datasets/org/images")


def test_the_run_folder_is_the_storage_and_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_job("quickstart").run_folder == tmp_path / "runs" / "quickstart"
    assert load_job("quickstart", ["storage.path=x", "name=mine"]).run_folder == tmp_path / "x" / "mine"
    assert load_job("quickstart", [f"storage.path={tmp_path}/far"]).run_folder == tmp_path / "far" / "quickstart"


# --- extends --------------------------------------------------------------------------------------------------------


def test_extends_lays_a_file_over_another_key_by_key(write):
    write(JOB | {"sampler": {"scheduler": "euler", "steps": 9}, "router": {"agents": ["uniform", "era"]}}, "base.yaml")
    config = load_job(str(write({"extends": "base.yaml", "name": "mine", "sampler": {"steps": 3}})))
    assert config.name == "mine"
    assert (config.sampler.scheduler, config.sampler.steps) == ("euler", 3)
    assert config.router.agents == ["uniform", "era"]


def test_a_list_replaces_a_list(write):
    write(JOB | {"budgets": [{"ratio": 0.7}, {"ratio": 0.6}]}, "base.yaml")
    config = load_job(str(write({"extends": "base.yaml", "budgets": [{"ratio": 0.3}]})))
    assert [budget.ratio for budget in config.budgets] == [0.3]


def test_extends_goes_through_folders_and_paths_stay_relative_to_the_file_that_names_them(tmp_path, write):
    for folder in ("deep/a-model", "mine/some-images", "deep/some-images"):
        (tmp_path / folder).mkdir(parents=True)
    write(JOB, "deep/base.yaml")
    write({"extends": "../deep/base.yaml", "seed": 5}, "mine/middle.yaml")
    config = load_job(str(write({"extends": "middle.yaml", "data": {"path": "some-images"}}, "mine/job.yaml")))
    assert config.seed == 5
    assert config.model.path == str(tmp_path / "deep" / "a-model")
    assert config.data.path == str(tmp_path / "mine" / "some-images")


def test_extending_a_file_that_is_not_there_is_refused(write):
    told = refusal(write({"extends": "gone.yaml"}))
    assert told.startswith("job.yaml: extends: no such file: gone.yaml; bundled jobs: ")
    assert "quickstart" in told


@pytest.mark.parametrize("name", ["lsun_church", "lsun_church.yaml"])
def test_a_bundled_job_is_extended_by_its_name_from_anywhere(write, name):
    config = load_job(str(write({"extends": name, "name": "mine"})))
    assert (config.name, config.data.resize) == ("mine", True)


def test_a_relative_path_that_is_not_there_is_told_in_full(tmp_path, write):
    config = load_job(str(write(JOB | {"model": {"path": "../models/gone"}}, "jobs/job.yaml")))
    assert config.model.path == str(tmp_path / "models" / "gone")


@pytest.mark.parametrize("value", [5, ["a.yaml"], {"a": 1}, "."])
def test_extending_something_that_is_no_file_is_refused(write, value):
    assert refusal(write({"extends": value})).startswith("job.yaml: extends: no such file: ")


def test_files_that_extend_each_other_are_refused(write):
    write({"extends": "job.yaml"}, "other.yaml")
    message = refusal(write({"extends": "other.yaml"}))
    assert "extends itself through job.yaml -> other.yaml -> job.yaml" in message


def test_a_file_that_extends_itself_is_refused(write):
    assert "extends itself through job.yaml -> job.yaml" in refusal(write({"extends": "job.yaml"}))


# --- one list of settings, one schema ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "extra", "settings"),
    [
        (Training, set(), TrainSettings),
        (Router, {"agents", "seeds", "influence_samples", "proxy_steps"}, RouteSettings),
        (Elastic, set(), ElasticSettings),
    ],
)
def test_a_section_and_what_workers_get_of_it_have_the_same_fields(section, extra, settings):
    assert set(section.model_fields) - extra == {field.name for field in dataclasses.fields(settings)}


def test_workers_get_the_values_of_the_job():
    config = load_job("quickstart")
    for section, settings in (
        (config.specialize, config.specialize.settings()),
        (config.finetune, config.finetune.settings()),
        (config.router, config.router.settings()),
        (config.elastic, config.elastic_settings()),
    ):
        for name, value in dataclasses.asdict(settings).items():
            assert value == getattr(section, name), name


@pytest.mark.parametrize("section", [Specialize, Finetune])
def test_both_trainings_have_every_setting_of_training(section):
    assert set(Training.model_fields) <= set(section.model_fields)


def leaves(schema: dict, node: dict, place: str = ""):
    """(dotted key, its schema) of every key that holds a value."""
    for name, child in node["properties"].items():
        target = child.get("items", child) if child.get("type") == "array" else child
        if "$ref" in target:
            yield from leaves(schema, schema["$defs"][target["$ref"].rpartition("/")[2]], f"{place}{name}.")
        else:
            yield f"{place}{name}", child


def test_the_schema_is_valid_and_describes_every_key():
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    described = {key: child.get("description") for key, child in leaves(schema, schema)}
    assert len(described) > 70
    assert {"name", "seed", "extends", "budgets.ratio", "specialize.steps", "finetune.ema_decay"} <= set(described)
    assert not [key for key, text in described.items() if not text or not text.endswith(".")]


def dotted(values: dict, place: str = "") -> set[str]:
    """Keys of a dumped job; those of list items without their number."""
    found = set()
    for name, value in values.items():
        inner = value[0] if isinstance(value, list) and value else value
        found |= dotted(inner, f"{place}{name}.") if isinstance(inner, dict) and inner else {f"{place}{name}"}
    return found


def test_the_schema_and_the_configuration_have_the_same_keys():
    schema = job_schema()
    assert {key for key, _ in leaves(schema, schema)} - {"extends"} == dotted(load_job("quickstart").model_dump())


@pytest.mark.parametrize("path", sorted([*BUNDLED.glob("*.yaml"), *BUNDLED.glob("cifar10/*.yaml")]), ids=lambda path: path.name)
def test_every_bundled_job_fits_the_schema(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), job_schema())


@pytest.mark.parametrize("job", [{"extends": "base.yaml"}, {"extends": "base.yaml", "sampler": {"steps": 5}}, JOB])
def test_the_schema_accepts_whole_jobs_and_files_that_extend_one(job):
    jsonschema.validate(job, job_schema())


@pytest.mark.parametrize("job", [{}, {"name": "x"}, JOB | {"sed": 1}, JOB | {"seed": "a"}, JOB | {"budgets": [{"ratio": 2}]}])
def test_the_schema_refuses_what_the_command_refuses(job, write):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, job_schema())
    refusal(write(job))


def test_a_configuration_survives_json():
    config = load_job("quickstart")
    assert JobConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
