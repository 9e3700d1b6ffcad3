"""Partitions: each convention against its definition, and what makes two splits the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.simulate.partitions import Partition, digest_of, partition, read, save
from edge_runtime import data as sources
from edge_runtime.data import Source, load
from wire.errors import ConfigError, DataError

Y = np.repeat(np.arange(5), 40)
DIGITS = Path(sources.__file__).parent / "digits8x8.npz"
WHOLE = ("iid", "dir0.5", "dirbal0.5", "skew0.7", "quantity1")


def sizes(split: Partition) -> list[int]:
    return [len(part) for part in split.parts]


@given(st.sampled_from([*WHOLE, "shard2", "path3"]), st.integers(2, 6), st.integers(0, 9), st.permutations(Y.tolist()))
@settings(max_examples=60, deadline=None)
def test_no_sample_is_dealt_twice_and_the_seed_decides(name, clients, seed, labels):
    y = np.array(labels)
    split = partition(name, y, clients, seed=seed)
    dealt = np.concatenate(split.parts)
    assert len(split.parts) == clients
    assert len(set(dealt.tolist())) == len(dealt)
    if name in WHOLE:
        assert sorted(dealt.tolist()) == list(range(200))
    assert partition(name, y, clients, seed=seed).digest == split.digest


def naive_flower(y: np.ndarray, clients: int, alpha: float, seed: int) -> list[list[int]]:
    """flwr-datasets' DirichletPartitioner (self_balancing=False, shuffle=True), written out."""
    rng = np.random.default_rng(seed)
    while True:
        dealt: dict[int, list[int]] = {i: [] for i in range(clients)}
        for k in sorted(set(y.tolist())):
            indices = [i for i, label in enumerate(y.tolist()) if label == k]
            shares = rng.dirichlet([alpha] * clients)
            total, start = 0.0, 0
            for i in range(clients):
                total += shares[i]
                end = int(total * len(indices)) if i < clients - 1 else len(indices)
                dealt[i] += indices[start:end]
                start = end
        if min(len(part) for part in dealt.values()) >= 10:
            for part in dealt.values():
                rng.shuffle(part)
            return list(dealt.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.3, 0.5, 10.0])
def test_dir_is_flowers_definition(alpha, seed):
    y = np.random.default_rng(7).permutation(Y)
    split = partition(f"dir{alpha:g}", y, 4, seed=seed)
    assert [part.tolist() for part in split.parts] == naive_flower(y, 4, alpha, seed)


def test_dir_has_at_least_ten_samples_each_or_says_why_not():
    assert min(sizes(partition("dir0.1", np.repeat(np.arange(10), 100), 8, seed=3))) >= 10
    with pytest.raises(DataError, match="fewer clients"):
        partition("dir0.5", Y[:30], 4)


def test_balanced_dirichlet_stops_filling_a_full_client():
    y = np.repeat(np.arange(10), 100)
    for seed in range(5):
        # A client below the mean may be overfilled by one class at most.
        assert max(sizes(partition("dirbal0.1", y, 5, seed=seed))) < 200 + 100


def test_shards_are_label_sorted_and_few_classes_a_client():
    split = partition("shard2", Y, 10, seed=1)
    assert sizes(split) == [20] * 10
    assert all(len(set(Y[part])) <= 2 for part in split.parts)
    assert sorted(np.concatenate(split.parts).tolist()) == list(range(200))
    assert sum(sizes(partition("shard2", Y[:199], 10))) == 180  # the remainder is dropped


def test_pathological_has_exactly_k_classes_and_the_first_by_number():
    split = partition("path2", Y, 7, seed=1)
    assert [len(set(Y[part])) for part in split.parts] == [2] * 7
    assert all(i % 5 in Y[part] for i, part in enumerate(split.parts))


def test_skew_runs_from_iid_to_sorted():
    by_label = partition("skew1", Y, 5)
    assert [set(Y[part]) for part in by_label.parts] == [{0}, {1}, {2}, {3}, {4}]
    half = partition("skew0.5", Y, 5)
    assert all((Y[part] == k).sum() >= 20 for k, part in enumerate(half.parts))
    assert sizes(partition("skew0", Y, 5)) == [40] * 5
    assert all(len(set(Y[part])) == 5 for part in partition("skew0", Y, 5).parts)


def test_people_stay_together():
    ids = np.random.default_rng(0).integers(100, 112, 200)
    for name in ("writers", "people"):
        split = partition(name, Y, 5, seed=2, ids=ids)
        owners = [set(ids[part].tolist()) for part in split.parts]
        assert all(len(owner) == 1 for owner in owners)
        assert all((ids == owner.pop()).sum() == len(part) for owner, part in zip(owners, split.parts, strict=True))
    grouped = partition("writers-grouped", Y, 5, seed=2, ids=ids)
    assert [len(set(ids[part].tolist())) for part in grouped.parts] == [2, 2, 2, 2, 4]
    assert sum(sizes(grouped)) == 200


@pytest.mark.parametrize(
    ("name", "clients", "words"),
    [
        ("dir", 4, "dirA"),
        ("iid3", 4, "not known"),
        ("dirichlet0.5", 4, "not known"),
        ("dir0", 4, "above 0"),
        ("shard1.5", 4, "whole number"),
        ("shard50", 5, "need 250 samples"),
        ("path6", 4, "have 5 classes"),
        ("skew1.1", 4, "share from 0 to 1"),
        ("iid", 201, "201 clients for 200 samples"),
        ("iid", 0, "0 clients"),
        ("writers", 4, "do not say who made"),
    ],
)
def test_an_impossible_partition_is_named(name, clients, words):
    with pytest.raises(ConfigError, match=words):
        partition(name, Y, clients)


def test_more_clients_than_people():
    with pytest.raises(ConfigError, match="come from 2 people"):
        partition("people", Y, 3, ids=Y % 2)


def test_a_split_is_data_with_a_digest(tmp_path):
    split = partition("dir0.5", Y, 4, seed=5)
    save(split, tmp_path / "split.json")
    again = read(tmp_path / "split.json", Y)
    assert again.digest == split.digest == digest_of(Y, split.parts)
    assert all(np.array_equal(a, b) for a, b in zip(again.parts, split.parts, strict=True))
    with pytest.raises(DataError, match="made for other data"):
        read(tmp_path / "split.json", Y[::-1])
    (tmp_path / "split.json").write_text("[]")
    with pytest.raises(DataError, match=r"split\.json"):
        read(tmp_path / "split.json", Y)


def test_the_digest_is_of_labels_sizes_and_indices():
    parts = (np.array([0, 2]), np.array([1]))
    plain = b"".join(int(n).to_bytes(8, "little") for n in (3, 7, 8, 9, 2, 1, 0, 2, 1))
    assert digest_of(np.array([7, 8, 9]), parts) == hashlib.sha256(plain).hexdigest()


def test_the_demo_split_does_not_move():
    y = load(Source("digits", validation=0.0, test=0.2, seed=0)).train[1]
    assert sizes(partition("dir0.5", y, 5, seed=0)) == [216, 278, 284, 378, 282]


@pytest.mark.parametrize(
    ("alpha", "seed", "digest"),
    [(0.5, 42, "f91cf2e46bd5aedf"), (0.3, 1, "0799b3cf8309adea"), (10.0, 7, "a4a8e147b2d28423")],
)
def test_dir_is_index_for_index_what_flwr_datasets_makes(alpha, seed, digest):
    """Recorded from flwr-datasets 0.6.1 on all digits, five clients, min_partition_size=10, self_balancing=False."""
    data = np.load(DIGITS)["y"]
    parts = [part.tolist() for part in partition(f"dir{alpha:g}", data, 5, seed=seed).parts]
    assert hashlib.sha256(str(parts).encode()).hexdigest()[:16] == digest
