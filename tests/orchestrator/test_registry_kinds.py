"""What a registry promises on a disk and in a bucket alike: versions, names for them, copies of them, and what is left when they go."""

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from orchestrator import aliases
from orchestrator.aliases import Conflict
from orchestrator.cli import main
from orchestrator.promotion import promote, rollback
from orchestrator.registry import Registry, is_published
from orchestrator.registry_clean import clean, remove
from orchestrator.registry_pull import local, pull
from tests import mixtures
from workers import objects_gcs
from workers.contracts import InputError, RunFailed, VerificationError


class Shelf:
    """A registry of any kind, and what lies in it. ``server``: of the bucket; None: it is on a disk."""

    def __init__(self, tmp_path: Path, server=None) -> None:
        self.server, self.sources = server, tmp_path / "sources"
        self.uri = str(tmp_path / "registry") if server is None else server.new_registry()
        self.registry = Registry(self.uri)

    def publish(self, run: str = "run-a", name: str = "quickstart", **numbers):
        source = mixtures.folder(self.sources / run, own=run.encode())
        return self.registry.publish(name, mixtures.manifest(run, name, **numbers), source)

    def state(self) -> dict:
        return mixtures.tree(Path(self.uri)) if self.server is None else self.server.keys(self.uri)

    def blobs(self) -> list[str]:
        return sorted(path for path in self.state() if path.startswith(".blobs/"))

    def damage(self, version, path: str) -> None:
        if self.server is None:
            (version.path / path).chmod(0o644)
            (version.path / path).write_bytes(b"damaged")
        else:
            self.server.put(self.uri, f".blobs/{version.sums()[path]}", b"damaged")

    def command(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, ["registry", *map(str, arguments), "--registry", self.uri], catch_exceptions=False)


@pytest.fixture
def shelf(request, tmp_path) -> Shelf:
    return Shelf(tmp_path, None if request.param == "local" else request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param]))


every = pytest.mark.parametrize("shelf", ["local", "s3", "gs"], indirect=True)
both = pytest.mark.parametrize("shelf", ["local", pytest.param("s3", marks=pytest.mark.slow), "gs"], indirect=True)
"""What is left for a bucket is long there and says little that the others do not."""


def refusal(result: Result, code: int) -> str:
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip("\n")


# --- versions -------------------------------------------------------------------------------------------------------


@every
def test_versions_are_numbered_found_and_verified(shelf):
    one, two = shelf.publish("run-a"), shelf.publish("run-b")
    assert [one.reference, two.reference] == ["quickstart:1", "quickstart:2"]
    again = Registry(shelf.uri)
    assert again.versions() == again.versions("quickstart") == [one, two]
    assert again.resolve("quickstart") == again.resolve("quickstart@latest") == two and again.resolve("quickstart:1") == one
    assert one.manifest().provenance.fingerprint == "run-a"
    assert [again.verify(version) for version in (one, two)] == [4, 4]
    assert one.where.partition("?")[0].endswith("/quickstart/1") and is_published(one.where)
    assert not is_published(one.where.replace("quickstart/1", "quickstart/3"))


@every
def test_publishing_again_makes_no_second_version(shelf):
    shelf.publish("run-a"), shelf.publish("run-b")
    before = shelf.state()
    assert shelf.publish("run-a").number == 1
    assert shelf.state() == before


@every
def test_an_expert_that_two_versions_share_is_stored_once(shelf):
    shelf.publish("run-a")
    before = shelf.blobs()
    version = shelf.publish("run-b")
    new = set(shelf.blobs()) - set(before)
    own = {version.sums()[path] for path in ("model-00002-of-00002.safetensors", *(["manifest.json"] if shelf.server else []))}
    assert new == {f".blobs/{digest}" for digest in own}
    if shelf.server is None:
        shared = [path for path in Path(shelf.uri).rglob("*") if path.is_file() and path.read_bytes() == mixtures.SHARED]
        assert len(shared) == 3 and len({path.stat().st_ino for path in shared}) == 1


@every
def test_a_damaged_file_is_found_and_the_others_are_listed(shelf):
    first, _ = shelf.publish("run-a"), shelf.publish("run-b")
    shelf.damage(first, "model-00002-of-00002.safetensors")
    done = shelf.command("verify", "--hashes-only", "--json")
    assert done.exit_code == 4 and "quickstart:1: model-00002-of-00002.safetensors: sha256 is " in done.stderr
    assert [row["ok"] for row in json.loads(done.stdout)] == [False, True]
    assert shelf.command("list").exit_code == 0


@both
def test_reading_changes_nothing(shelf):
    shelf.publish("run-a")
    before = shelf.state()
    for command in (
        ["list"],
        ["show", "quickstart"],
        ["verify", "--hashes-only"],
        ["history", "quickstart"],
        ["lineage", "quickstart"],
        ["gc", "--dry-run"],
    ):
        assert shelf.command(*command).exit_code == 0, command
    assert shelf.state() == before


# --- aliases --------------------------------------------------------------------------------------------------------


def moves(shelf, alias: str = "champion") -> list[tuple]:
    return [(e.number, e.action, e.previous, e.version) for e in aliases.history(shelf.registry.files, "quickstart", alias)]


@both
def test_an_alias_moves_and_every_move_stays_in_its_history(shelf):
    one, two = shelf.publish("run-a"), shelf.publish("run-b")
    assert promote(shelf.registry, one, "champion").version == 1
    assert promote(shelf.registry, two, "champion", expected=1).previous == 1
    assert promote(shelf.registry, two, "champion") is None  # already
    assert promote(shelf.registry, one, "staging").number == 1
    assert shelf.registry.resolve("quickstart@champion") == two and shelf.registry.resolve("quickstart@staging") == one
    assert moves(shelf) == [(1, "promote", None, 1), (2, "promote", 1, 2)]
    assert shelf.registry.aliases_of("quickstart") == {2: ["champion"], 1: ["staging"]}
    [first, second] = json.loads(shelf.command("list", "--json").stdout)
    assert (first["aliases"], second["aliases"]) == (["staging"], ["champion"])
    lines = shelf.command("history", "quickstart@champion").stdout.splitlines()
    assert [" nothing -> quickstart:1 " in lines[0], " quickstart:1 -> quickstart:2 " in lines[1]] == [True, True]
    with pytest.raises(InputError, match="quickstart has no alias 'best': its aliases are champion, staging, latest"):
        shelf.registry.resolve("quickstart@best")


@both
def test_rollback_undoes_promotions_one_by_one_and_passes_over_removed_versions(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(4)]
    for version in versions:
        promote(shelf.registry, version, "champion")
    remove(shelf.registry, versions[1])
    assert [rollback(shelf.registry, "quickstart", "champion").version for _ in range(3)] == [3, 1, None]
    with pytest.raises(InputError, match="quickstart@champion names nothing that could be rolled back"):
        rollback(shelf.registry, "quickstart", "champion")
    with pytest.raises(InputError, match="quickstart has no alias 'champion'"):
        shelf.registry.resolve("quickstart@champion")
    assert promote(shelf.registry, versions[3], "champion").previous is None
    assert len(moves(shelf)) == 8


@every
def test_a_move_that_came_first_is_a_conflict_and_nothing_changes(shelf, monkeypatch):
    one, two, three = (shelf.publish(f"run-{i}") for i in range(3))
    promote(shelf.registry, one, "champion")
    with pytest.raises(Conflict, match="was expected to name quickstart:2, but another move came first and it names quickstart:1"):
        promote(shelf.registry, two, "champion", expected=2)
    verify = Registry.verify

    def meanwhile(registry, version):
        monkeypatch.setattr(Registry, "verify", verify)
        promote(registry, three, "champion")
        return verify(registry, version)

    monkeypatch.setattr(Registry, "verify", meanwhile)
    done = shelf.command("promote", "quickstart:2")
    assert refusal(done, 1).startswith(
        "conflict: quickstart@champion was expected to name quickstart:1, but another move came first and it"
    )
    assert moves(shelf) == [(1, "promote", None, 1), (2, "promote", 1, 3)]


@both
def test_what_is_not_good_enough_or_not_whole_is_not_promoted(shelf):
    one, two = shelf.publish("run-a", frechet=7.0), shelf.publish("run-b", frechet=7.5)
    assert shelf.command("promote", "quickstart:1", "--require", "fd<=7").exit_code == 0
    told = refusal(shelf.command("promote", "quickstart", "--require", "fd_delta<=0.3"), 1)
    assert told == "quickstart:2 is not promoted to champion: fd_delta is 0.5, required is fd_delta<=0.3"
    done = shelf.command("promote", "quickstart", "--require", "fd_delta <= 0.6", "--require", "paired_mse<0.02", "--json")
    assert json.loads(done.stdout)["event"]["required"] == ["fd_delta <= 0.6", "paired_mse<0.02"]
    shelf.damage(one, "config.json")
    assert "config.json: sha256 is" in refusal(shelf.command("promote", "quickstart:1"), 4)
    assert shelf.registry.resolve("quickstart@champion") == two


def test_a_version_has_no_history(tmp_path):
    shelf = Shelf(tmp_path)
    promote(shelf.registry, shelf.publish("run-a"), "champion")
    told = refusal(shelf.command("history", "quickstart:1"), 2)
    assert told == "history quickstart:1: aliases are moved, not versions: give quickstart or quickstart@champion"
    assert "nothing -> quickstart:1" in shelf.command("history", "quickstart").stdout


# --- removing -------------------------------------------------------------------------------------------------------


@every
def test_a_removed_version_is_gone_and_its_number_is_not_used_again(shelf):
    shelf.publish("run-a"), shelf.publish("run-b")
    assert shelf.command("rm", "quickstart:2").exit_code == 0
    assert [version.number for version in shelf.registry.versions()] == [1]
    assert "quickstart:2 was removed: it has 1" in refusal(shelf.command("show", "quickstart:2"), 2)
    assert shelf.publish("run-b").number == 3  # what was removed does not stand in for it
    for model in ("quickstart", "quickstart@latest"):
        assert "give the version's number" in refusal(shelf.command("rm", model), 2)


@both
def test_what_an_alias_names_is_not_removed(shelf):
    version = shelf.publish("run-a")
    shelf.publish("run-b")
    promote(shelf.registry, version, "champion")
    before = shelf.state()
    assert "quickstart:1 is named by quickstart@champion: promote another version" in refusal(shelf.command("rm", "quickstart:1"), 2)
    assert shelf.state() == before


@both
def test_a_removal_gives_way_to_a_promotion_at_the_same_time(shelf, monkeypatch):
    version = shelf.publish("run-a")
    put = type(shelf.registry.files).put

    def meanwhile(files, path, content):
        monkeypatch.setattr(type(files), "put", put)
        if not path.endswith("REMOVED"):
            return put(files, path, content)
        aliases.append(files, "quickstart", "champion", None, "promote", 1)  # after the removal looked for aliases
        return put(files, path, content)

    monkeypatch.setattr(type(shelf.registry.files), "put", meanwhile)
    with pytest.raises(Conflict, match="moved meanwhile, and quickstart:1 is named by quickstart@champion: it is not removed"):
        remove(shelf.registry, version)
    assert shelf.registry.verify(shelf.registry.resolve("quickstart@champion")) == 4


@every
def test_a_promotion_gives_way_to_a_removal_that_looked_before(shelf, monkeypatch):
    one, two = shelf.publish("run-a"), shelf.publish("run-b")
    promote(shelf.registry, one, "champion")
    append = aliases.append

    def meanwhile(*arguments):
        monkeypatch.setattr(aliases, "append", append)
        remove(shelf.registry, two)
        return append(*arguments)

    monkeypatch.setattr(aliases, "append", meanwhile)
    with pytest.raises(Conflict, match="quickstart:2 was removed meanwhile: quickstart@champion names what it did before"):
        promote(shelf.registry, two, "champion")
    assert shelf.registry.resolve("quickstart@champion") == one


@both
def test_gc_keeps_what_is_named_and_the_newest_and_frees_what_only_the_others_held(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(5)]
    promote(shelf.registry, versions[1], "champion")
    other = shelf.publish("run-9", name="other")
    before, blobs = shelf.state(), shelf.blobs()
    told = json.loads(shelf.command("gc", "--keep-aliased", "--keep-last", 2, "--dry-run", "--grace-hours", 0, "--json").stdout)
    assert told["versions"] == ["quickstart:1", "quickstart:3"] and shelf.state() == before
    done = json.loads(shelf.command("gc", "--keep-aliased", "--keep-last", 2, "--grace-hours", 0, "--json").stdout)
    assert {**done, "dry_run": True} == told
    assert set(blobs) - set(shelf.blobs()) == set(done["debris"]) and len(done["debris"]) == (4 if shelf.server else 2)
    assert [version.reference for version in shelf.registry.versions()] == ["other:1", "quickstart:2", "quickstart:4", "quickstart:5"]
    assert [shelf.registry.verify(version) for version in shelf.registry.versions()] == [4] * 4
    assert clean(shelf.registry, "other", keep_aliased=True).versions == []  # the newest stays
    assert shelf.registry.verify(other) == 4
    assert shelf.publish("run-2").number == 6


@every
def test_gc_leaves_the_young_alone_and_versions_that_it_was_not_told_to_remove(shelf):
    for i in range(3):
        shelf.publish(f"run-{i}")
    if shelf.server is None:
        leftover = Path(shelf.uri) / "quickstart" / ".publishing-1-aa"
        leftover.mkdir()
        (leftover / "weights").write_bytes(b"half")
    else:
        shelf.registry.files.put(".blobs/" + "0" * 64, b"half")
    before = shelf.state()
    found = clean(shelf.registry)
    assert (found.versions, found.debris, found.too_young) == ([], [], 1) and shelf.state() == before
    assert clean(shelf.registry, grace_hours=0).freed_bytes == 4
    assert len(shelf.registry.versions()) == 3 and not any(path.endswith("0" * 64) or "publishing" in path for path in shelf.state())


@both
def test_gc_refuses_when_it_cannot_know_what_is_needed(shelf):
    versions = [shelf.publish(f"run-{i}") for i in range(2)]
    promote(shelf.registry, versions[0], "champion")
    path = "quickstart/.aliases/champion/1/event.json"
    shelf.registry.files.put(path, b"{")
    before = shelf.state()
    assert "quickstart@champion: event 1: cannot be read" in refusal(shelf.command("gc", "--keep-aliased", "--grace-hours", 0), 4)
    assert "quickstart@champion: event 1: cannot be read" in refusal(shelf.command("rm", "quickstart:1"), 4)
    assert shelf.state() == before


# --- copies ---------------------------------------------------------------------------------------------------------


@both
def test_a_pulled_folder_holds_the_published_files_and_nothing_else(shelf, tmp_path):
    version = shelf.publish("run-a")
    assert shelf.command("pull", "quickstart", "--out", tmp_path / "copy").exit_code == 0
    copy = mixtures.tree(tmp_path / "copy")
    assert {path: copy[path] for path in copy if path not in ("manifest.json", "SHA256SUMS")} == mixtures.tree(shelf.sources / "run-a")
    assert json.loads(copy["manifest.json"]) == version.manifest().to_json()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert json.loads(shelf.command("pull", "quickstart", "--out", tmp_path / "copy", "--json").stdout)["fetched_bytes"] == 0
    if shelf.server is None:
        assert (tmp_path / "copy" / "config.json").stat().st_nlink == 1  # a copy is the user's to change


def test_a_place_that_has_no_name_is_no_folder_to_pull_into(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.publish("run-a")
    told = "--out: / cannot become a version's folder: give a folder to make"
    assert refusal(shelf.command("pull", "quickstart", "--out", "/"), 2) == told


@every
def test_a_killed_pull_is_continued_in_the_middle_of_a_file(shelf, tmp_path):
    version, beside = shelf.publish("run-a"), tmp_path / ".copy.pulling"
    digest = version.sums()["model-00001-of-00002.safetensors"]
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    (beside / f".model-00001-of-00002.safetensors.{digest[:12]}.part").write_bytes(mixtures.SHARED[:100_000])
    (beside / ".model-00002-of-00002.safetensors.aaaaaaaaaaaa.part").write_bytes(b"of another version")
    left = len(mixtures.SHARED) - 100_000 + len(b"run-a") + len('{"steps": 20}')
    pulled = pull(version, tmp_path / "copy")
    assert pulled - len((tmp_path / "copy" / "manifest.json").read_bytes()) == left
    assert (tmp_path / "copy" / "model-00001-of-00002.safetensors").read_bytes() == mixtures.SHARED
    assert len(mixtures.tree(tmp_path / "copy")) == 7 and not beside.exists()


@both
def test_a_wrong_rest_of_a_killed_pull_is_fetched_again(shelf, tmp_path):
    version = shelf.publish("run-a")
    digest = version.sums()["model-00001-of-00002.safetensors"]
    (tmp_path / ".copy.pulling").mkdir()
    (tmp_path / ".copy.pulling" / f".model-00001-of-00002.safetensors.{digest[:12]}.part").write_bytes(b"x" * 1000)
    pull(version, tmp_path / "copy")
    assert (tmp_path / "copy" / "model-00001-of-00002.safetensors").read_bytes() == mixtures.SHARED


@both
def test_a_damaged_version_is_not_pulled_and_a_foreign_folder_not_touched(shelf, tmp_path):
    version = shelf.publish("run-a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is there and is not quickstart:1"):
        pull(version, tmp_path / "mine")
    shelf.damage(version, "config.json")
    with pytest.raises(VerificationError, match="config.json: sha256 is"):
        pull(version, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []
    assert mixtures.tree(tmp_path / "mine") == {"thesis.tex": b"precious"}


@both
def test_a_version_is_used_where_it_lies_or_from_a_cache(shelf, tmp_path):
    version = shelf.publish("run-a")
    folder = local(shelf.registry, version, tmp_path / "cache")
    assert (folder == version.path) if shelf.server is None else folder.is_relative_to(tmp_path / "cache")
    assert (folder / "config.json").read_text() == "{}"
    if shelf.server:
        requests = len(shelf.server.requests)
        assert local(shelf.registry, version, tmp_path / "cache") == folder
        assert len(shelf.server.requests) - requests < 8  # manifest and sums, no weights


# --- comparing ------------------------------------------------------------------------------------------------------


@both
def test_diff_names_what_differs_and_nothing_else(shelf):
    shelf.publish("run-a", paired_mse=0.02), shelf.publish("run-b", paired_mse=0.05)
    found = json.loads(shelf.command("diff", "quickstart:1", "quickstart:2", "--json").stdout)
    assert found["results"] == [{"name": "paired_mse", "a": 0.02, "b": 0.05, "change": pytest.approx(0.03)}]
    assert found["origin"] == [{"key": "fingerprint", "a": "run-a", "b": "run-b"}]
    assert (found["plan"], found["experts"], found["config"]) == ([], [], [])
    assert found["files"] == {"same": 3, "changed": ["model-00002-of-00002.safetensors"], "only_a": [], "only_b": []}
    assert "result   paired_mse: 0.02 -> 0.05  (+0.03)" in shelf.command("diff", "quickstart:1", "quickstart:2").stdout.splitlines()


@both
def test_lineage_names_relatives_shared_experts_and_moves(shelf):
    one = shelf.publish("run-a")
    shelf.publish("run-b"), shelf.publish("run-a", name="other")
    promote(shelf.registry, one, "champion")
    found = json.loads(shelf.command("lineage", "quickstart:1", "--json").stdout)
    assert (found["same_run"], found["same_model"]) == (["other:1"], ["other:1", "quickstart:2"])
    assert found["shares_weight_files_with"] == {"other:1": 2, "quickstart:2": 1}
    assert found["aliases"] == ["champion"] and [move["alias"] for move in found["moves"]] == ["champion"]
    assert "version  quickstart:1: macs-0.50, agent era; named by champion" in shelf.command("lineage", "quickstart:1").stdout


# --- buckets alone --------------------------------------------------------------------------------------------------


def test_a_version_in_a_bucket_is_blobs_and_one_small_object(tmp_path, server):
    shelf = Shelf(tmp_path, server)
    version = shelf.publish("run-a")
    blobs = {f".blobs/{digest}" for digest in version.sums().values()}
    assert set(shelf.state()) == {*blobs, ".conditional", "quickstart/1/SHA256SUMS"}


def test_a_store_that_ignores_conditions_is_refused(tmp_path, server):
    shelf = Shelf(tmp_path, server)
    server.ignores_conditions = True
    told = "the store ignores (If-None-Match|ifGenerationMatch), so two writers could overwrite each other: nothing was written"
    with pytest.raises(RunFailed, match=told):
        shelf.publish("run-a")
    assert set(shelf.state()) == {".conditional"}


def test_an_old_blob_is_made_new_when_it_is_used_again_so_that_gc_leaves_it(tmp_path, server, monkeypatch):
    shelf = Shelf(tmp_path, server)
    remove(shelf.registry, shelf.publish("run-a"))
    now = time.time()
    monkeypatch.setattr("orchestrator.registry_objects.time.time", lambda: now + 7200)
    server.requests.clear()
    shelf.publish("run-b")
    shared = f".blobs/{shelf.registry.resolve('quickstart').sums()['model-00001-of-00002.safetensors']}"
    asked = [method for method, path in server.requests if path.endswith(shared)]
    # a look, and a copy in one step or two; then before and after the version appears a look whether it is still there
    assert asked == (["HEAD", "PUT", "HEAD", "HEAD"] if shelf.uri.startswith("s3") else ["GET", "POST", "POST", "GET", "GET"])


def test_credentials_are_in_no_output_and_in_no_object(tmp_path, s3, monkeypatch):
    shelf = Shelf(tmp_path, s3)
    shelf.publish("run-a")
    said = [shelf.command(*command) for command in (["list", "--json"], ["show", "quickstart"], ["promote", "quickstart"], ["gc"])]
    missing = shelf.uri.replace("bucket-", "no-such-bucket-")
    said.append(CliRunner().invoke(main, ["registry", "promote", "quickstart", "--registry", missing]))
    text = "".join(result.output for result in said) + "".join(
        shelf.registry.files.uri(path) + b"".join(shelf.registry.files.chunks(path)).decode("latin-1") for path in shelf.state()
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("bucket-", "no-such-bucket-"), "no-such-bucket-"),
        (("127.0.0.1:", "127.0.0.1:1&x="), "unknown option 'x': known are endpoint_override, region, scheme"),
        (("scheme=http&", "scheme=ftp&"), "scheme is not http or https"),
        (("s3://", "s3://key:secret@"), "a URI must not hold credentials"),
        (("/mixtures", "/../mixtures"), "is not s3://bucket/prefix with a bucket's name and plain folders"),
        (("&region", "&secret_key=x&region"), "a URI must not hold credentials"),
    ],
)
def test_a_wrong_uri_is_one_line(tmp_path, s3, change, told):
    uri = s3.new_registry().replace(*change)
    for command in (["show", "quickstart"], ["promote", "quickstart"]):
        done = CliRunner().invoke(main, ["registry", *command, "--registry", uri], catch_exceptions=False)
        assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1 and "secret@" not in done.stderr


@pytest.mark.parametrize(
    ("uri", "variables"),
    [
        ("s3://bucket/mixtures?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "the AWS_* variables"),
        ("gs://bucket/mixtures?endpoint_override=127.0.0.1:9&scheme=http", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_a_store_that_does_not_answer_is_one_line_and_exit_code_1(s3, gcs, monkeypatch, uri, variables):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(objects_gcs, "PATIENCE_S", 1)
    done = CliRunner().invoke(main, ["registry", "list", "--registry", uri], catch_exceptions=False)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    bucket = uri.partition("?")[0]
    assert done.stderr.startswith(f"error: {bucket}")
    assert done.stderr.endswith(f"see that the bucket, endpoint_override and {variables} are right\n")


def test_a_service_account_s_key_is_in_no_output_and_sent_to_no_emulator(tmp_path, gcs, monkeypatch):
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {"type": "service_account", "client_email": "a@b", "private_key": pem, "token_uri": "http://127.0.0.1:9/token"}
    (tmp_path / "account.json").write_text(json.dumps({"project_id": "p", "private_key_id": "hush-hush", **account}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    monkeypatch.setattr(objects_gcs, "PATIENCE_S", 1)
    shelf = Shelf(tmp_path, gcs)
    shelf.publish("run-a")
    assert shelf.command("list").exit_code == 0 and not gcs.authorized
    told = refusal(CliRunner().invoke(main, ["registry", "list", "--registry", "gs://bucket/x?endpoint_override=127.0.0.1:9"]), 1)
    assert "/token" in told and "hush" not in told and not any(line in told for line in pem.splitlines()[1:-1])


# --- disks alone ----------------------------------------------------------------------------------------------------


def test_where_links_are_refused_files_are_copied(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path)

    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    versions = [shelf.publish(run) for run in ("run-a", "run-b")]
    assert [shelf.registry.verify(version) for version in versions] == [4, 4]
    assert shelf.blobs() == []


def test_gc_leaves_a_damaged_version_and_its_files_where_they_are(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.publish("run-a"), shelf.publish("run-b")
    shelf.damage(shelf.registry.resolve("quickstart:1"), "manifest.json")
    before = shelf.state()
    clean(shelf.registry, grace_hours=0)
    assert shelf.state() == before


@pytest.mark.parametrize("linked", ["quickstart", "quickstart/1", "quickstart/.aliases", ".blobs"])
def test_a_folder_that_is_a_link_is_not_followed(tmp_path, linked):
    shelf = Shelf(tmp_path)
    shelf.publish("run-a")
    promote(shelf.registry, shelf.registry.resolve("quickstart"), "champion")
    moved = tmp_path / "elsewhere"
    (Path(shelf.uri) / linked).rename(moved)
    (Path(shelf.uri) / linked).symlink_to(moved)
    before = mixtures.tree(moved)
    for command in (["list"], ["verify"], ["show", "quickstart:1"], ["rm", "quickstart:1"], ["gc", "--grace-hours", "0"]):
        result = shelf.command(*command)
        assert result.exit_code in (0, 2, 4) and result.stderr.count("\n") <= 1, result.output
    if linked in ("quickstart", ".blobs"):
        result = CliRunner().invoke(main, ["registry", "list", "--registry", shelf.uri], catch_exceptions=False)
        with pytest.raises(OSError, match="is a link, and a registry follows none"):
            shelf.publish("run-b")
    assert mixtures.tree(moved) == before
