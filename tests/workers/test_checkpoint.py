"""A checkpoint is whole or not there, and comes back bit for bit."""

import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers import checkpoint
from workers.contracts import InputError
from workers.session import Session


def tensors(seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(3, 4, generator=gen),
        "model.turned": torch.randn(3, 4, generator=gen).T,
        "ema.half": torch.randn(5, generator=gen).to(torch.bfloat16),
        "updates": torch.tensor(7),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def save(root: Path, step: int, **about: object) -> Path:
    return checkpoint.save_step(root, step, lambda folder: checkpoint.write(folder, tensors(step), {"step": step, **about}))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    about = {"step": 120, "history": [[60, 0.1], [120, 1 / 3]], "interval": {"start": 0, "stop": 300}}
    folder = checkpoint.save_step(tmp_path, 120, lambda at: checkpoint.write(at, tensors(), about))
    found, described = checkpoint.read(folder)
    assert folder == tmp_path / "step_0000120"
    assert found.keys() == tensors().keys()
    assert described == {"schema": checkpoint.SCHEMA, **about}
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


def test_a_prefix_selects_and_goes(tmp_path):
    found, about = checkpoint.read(save(tmp_path, 1), prefix="model.")
    assert found.keys() == {"weight", "turned"}
    assert about["step"] == 1


def test_a_checkpoint_is_two_files(tmp_path):
    assert names(save(tmp_path, 1)) == ["checkpoint.json", "state.safetensors"]


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 9_999_999, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_0000100", "step_9999999"]


def test_saving_a_step_again_keeps_a_whole_one_and_replaces_a_broken_one(tmp_path):
    save(tmp_path, 5, attempt=1)
    save(tmp_path, 5, attempt=2)
    assert names(tmp_path) == ["step_0000005"]
    assert checkpoint.read(tmp_path / "step_0000005")[1]["attempt"] == 1
    truncate("state.safetensors", 100)(tmp_path / "step_0000005")
    save(tmp_path, 5, attempt=3)
    assert names(tmp_path) == ["step_0000005"]
    assert checkpoint.read(tmp_path / "step_0000005")[1]["attempt"] == 3


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path, error):
    save(tmp_path, 5)

    def fail(folder: Path) -> None:
        checkpoint.write(folder, tensors(), {})
        raise error

    for step in (5, 6):
        with pytest.raises(error):
            checkpoint.save_step(tmp_path, step, fail)
    assert names(tmp_path) == ["step_0000005"]
    assert checkpoint.read(tmp_path / "step_0000005")[1]["step"] == 5


def test_what_a_killed_write_left_is_no_checkpoint_and_no_hindrance(tmp_path):
    left = tmp_path / ".step_0000005.0123abcd.tmp"
    left.mkdir()
    (left / "rubbish").write_text("half")
    assert checkpoint.latest(tmp_path) is None
    assert names(save(tmp_path, 5)) == ["checkpoint.json", "state.safetensors"]
    with Session(folder=str(tmp_path)).resume() as found:
        assert found == tmp_path / "step_0000005"
    assert names(tmp_path) == ["step_0000005"], "a run that goes on removes what is left"


def test_a_full_disk_is_an_error_that_says_so(tmp_path):
    """Without files of more than 100 bytes, as without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, heard)
    assert error.value.errno == errno.EFBIG
    assert names(tmp_path) == []


def test_what_resume_passes_over_is_told(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    truncate("state.safetensors", 100)(newer)
    session = Session(folder=str(tmp_path))
    with session.resume() as found:
        assert found == older
    [told] = session.broken
    assert str(newer) in told


def test_there_is_no_latest_checkpoint_in_an_empty_or_missing_folder(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def truncate(name: str, kept: int):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:kept])

    return damage


def overwrite(content: bytes):
    return lambda folder: (folder / "checkpoint.json").write_bytes(content)


DAMAGES = {
    "state truncated": truncate("state.safetensors", 100),
    "state cut by one byte": lambda folder: truncate("state.safetensors", (folder / "state.safetensors").stat().st_size - 1)(folder),
    "state empty": truncate("state.safetensors", 0),
    "state missing": lambda folder: (folder / "state.safetensors").unlink(),
    "JSON missing": lambda folder: (folder / "checkpoint.json").unlink(),
    "JSON truncated": truncate("checkpoint.json", 10),
    "JSON of zeros": overwrite(b"\0" * 64),
    "JSON of no text": overwrite(b"\xff\xfe\x80"),
    "JSON no object": overwrite(b"[1]"),
    "other schema": overwrite(json.dumps({"schema": 2, "step": 2}).encode()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_latest_passes_over_a_broken_checkpoint_and_reading_it_names_it(tmp_path, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == newer
    damage(newer)
    assert checkpoint.latest(tmp_path) == older
    with pytest.raises(InputError, match=str(newer)):
        checkpoint.read(newer)


def test_a_new_checkpoint_survives_beside_later_broken_ones(tmp_path):
    for step in (20, 30):
        truncate("state.safetensors", 10)(save(tmp_path, step))
    assert checkpoint.latest(tmp_path) is None
    new = save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == new


def test_another_schema_is_refused_with_both_numbers(tmp_path):
    folder = save(tmp_path, 1)
    DAMAGES["other schema"](folder)
    with pytest.raises(InputError, match="has schema 2, this version reads 1"):
        checkpoint.read(folder)
