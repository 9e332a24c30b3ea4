"""Of who creates an object, one is told that it is theirs, whatever the store answers on the way."""

import itertools

import pytest

from workers import objects
from workers.contracts import RunFailed
from workers.objects import ObjectStore


@pytest.fixture
def store(s3, monkeypatch) -> ObjectStore:
    monkeypatch.setattr(objects.time, "sleep", lambda seconds: None)
    return ObjectStore.of(s3.new_registry(), "registry")


def content(store: ObjectStore) -> bytes:
    return b"".join(store.chunks("a/1"))


@pytest.mark.parametrize(
    "faults",
    [["busy"], ["busy after"], ["lost"], ["busy", "lost"], ["busy", "busy after"], ["busy"] * 7],
    ids=lambda faults: f"{len(faults)} times, {faults[-1]} last",
)
def test_an_object_is_its_makers_after_whatever_was_answered_and_no_one_else_s(store, s3, faults):
    s3.faults = itertools.chain(faults, itertools.repeat(""))
    assert store.create("a/1", b"mine") and content(store) == b"mine"
    s3.faults = itertools.chain(faults, itertools.repeat(""))
    assert not store.create("a/1", b"theirs") and content(store) == b"mine"


def test_a_store_that_stays_busy_is_given_up_in_one_line(store, s3):
    s3.faults = itertools.repeat("busy")
    with pytest.raises(RunFailed, match="a/1: others are writing it all the time: run the same command again"):
        store.create("a/1", b"mine")
    s3.faults = itertools.repeat("")
    assert store.find("a/1") is None


def test_the_check_for_conditions_bears_busy_and_lost_answers(store, s3):
    s3.faults = itertools.cycle(["busy", "lost", "busy after"])
    store.require_conditions()
