"""How data are spread over devices, by name: the conventions of the field, exactly, and saved as data with a digest.

========== =============================================================================================
iid        a permutation, cut into equal parts
dirA       class over clients, p ~ Dir(A), unbalanced: Flower's DirichletPartitioner (min 10 samples)
dirbalA    the same, balanced and with shuffled classes: NIID-Bench, FedLab, PFLlib, FedDIP
shardS     label-sorted shards, S a client (McMahan et al. 2017 with S = 2); the remainder is dropped
pathK      exactly K classes a client, the first one by its number (NIID-Bench #C = K)
skewS      a share S of each client's samples from its slice of the label-sorted set, the rest iid
quantityA  sizes q ~ Dir(A), samples at random (min 10)
writers    one client a writer (natural ids), as many writers as clients; `people` is the same
writers-grouped   all writers dealt to the clients, the last group takes the remainder (PruneFL)
========== =============================================================================================
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigError, DataError

Indices: TypeAlias = NDArray[np.int64]
_LEAST = 10
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Partition:
    """Which samples each client owns.

    Attributes:
        name: By which convention.
        seed: By which seed.
        parts: Indices of the samples of each client; no sample is in two parts.
        digest: SHA-256 (hex) over the labels and all indices: two results with equal digests had equal splits.
    """

    name: str
    seed: int
    parts: tuple[Indices, ...]
    digest: str


def partition(
    name: str, labels: NDArray[Any], clients: int, *, seed: int = 0, ids: NDArray[Any] | None = None
) -> Partition:
    """Spread samples over clients.

    Args:
        name: A convention with its number, for example ``dir0.5``.
        labels: Class of every sample, integers [n].
        clients: How many parts.
        seed: Decides everything that is random.
        ids: Who made each sample [n], for `writers` and `people`.

    Raises:
        ConfigError: The name is not known, or its number or the clients make no sense for these data.
        DataError: No split with enough samples for every client was found.
    """
    y = np.asarray(labels).astype(np.int64).ravel()
    if not 1 <= clients <= len(y):
        raise ConfigError(f"partition {name}: {clients} clients for {len(y)} samples")
    rng = np.random.default_rng(seed)
    if name in {"writers", "people", "writers-grouped"}:
        if ids is None or len(ids) != len(y):
            raise ConfigError(f"partition {name}: these data do not say who made each sample; use iid or dir0.5")
        parts = _by_id(np.asarray(ids).ravel(), clients, rng, grouped=name == "writers-grouped")
    else:
        make, number = _find(name)
        parts = make(y, clients, number, rng)
    frozen = tuple(np.asarray(part, np.int64) for part in parts)
    if any(len(part) == 0 for part in frozen):
        raise DataError(f"partition {name}: a client is left without samples; use fewer than {clients} clients")
    return Partition(name, seed, frozen, digest_of(y, frozen))


def digest_of(labels: Indices, parts: tuple[Indices, ...]) -> str:
    """Give the SHA-256 over labels, sizes and indices, all as little-endian int64."""
    found = hashlib.sha256()
    for numbers in (np.array([len(labels)]), labels, np.array([len(p) for p in parts]), *parts):
        found.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    return found.hexdigest()


def save(split: Partition, path: Path) -> None:
    """Write a split as JSON."""
    plain = {
        "name": split.name,
        "seed": split.seed,
        "digest": split.digest,
        "parts": [part.tolist() for part in split.parts],
    }
    path.write_text(json.dumps(plain), encoding="utf-8")


def read(path: Path, labels: NDArray[Any]) -> Partition:
    """Read a split back and check it against the labels it was made for.

    Raises:
        DataError: It is no split, or one of other data.
    """
    y = np.asarray(labels).astype(np.int64).ravel()
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(np.asarray(part, np.int64).ravel() for part in plain["parts"])
        split = Partition(str(plain["name"]), int(plain["seed"]), parts, str(plain["digest"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not a saved partition ({error}): make it again") from error
    if digest_of(y, parts) != split.digest:
        raise DataError(f"{path}: this partition was made for other data, or it was changed: make it again")
    return split


def _find(name: str) -> tuple[_Make, float]:
    match = re.fullmatch(r"(iid|dirbal|dir|shard|path|skew|quantity)(\d+(?:\.\d+)?)?", name)
    if match is None or (match[1] == "iid") != (match[2] is None):
        raise ConfigError(
            f"partition {name!r} is not known; write iid, dirA, dirbalA, shardS, pathK, skewS or quantityA with a number "
            "(dir0.5, dirbal0.1, shard2, path3, skew0.8, quantity1), or writers, writers-grouped, people"
        )
    number = float(match[2] or 0)
    kind = match[1]
    if kind in {"shard", "path"} and (number < 1 or number != int(number)):
        raise ConfigError(f"partition {name}: wanted is a whole number from 1, as in {kind}2")
    if kind == "skew" and number > 1:
        raise ConfigError(f"partition {name}: wanted is a share from 0 to 1, as in skew0.8")
    if kind in {"dir", "dirbal", "quantity"} and not number > 0:
        raise ConfigError(f"partition {name}: wanted is a number above 0, as in {kind}0.5")
    return _MAKERS[kind], number


def _iid(y: Indices, clients: int, _: float, rng: np.random.Generator) -> list[Indices]:
    return np.array_split(rng.permutation(len(y)), clients)


def _dirichlet(y: Indices, clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Draw p ~ Dir(alpha) over clients for each class in sorted order, cut its indices, unshuffled, at int(cumsum(p) m).

    Source: flwr-datasets, DirichletPartitioner with self_balancing=False: everything is redone until each client has
    10 samples; at the end each client's samples are shuffled. It gives up after 10 tries, this does after 1,000.
    """
    of_classes = [np.nonzero(y == k)[0] for k in np.unique(y)]
    for _ in range(_TRIES):
        cuts = [
            (np.cumsum(rng.dirichlet([alpha] * clients)) * len(of_class)).astype(int)[:-1] for of_class in of_classes
        ]
        sizes = sum(np.diff(c, prepend=0, append=len(of_class)) for c, of_class in zip(cuts, of_classes, strict=True))
        if np.min(sizes) >= _LEAST:  # most tries end here, before anything is dealt
            pieces = zip(*(np.split(of_class, c) for c, of_class in zip(cuts, of_classes, strict=True)), strict=True)
            dealt: list[list[int]] = [np.concatenate(part).tolist() for part in pieces]
            for part in dealt:
                rng.shuffle(part)
            return [np.array(part, np.int64) for part in dealt]
    raise _hopeless(f"dir{alpha:g}", len(y), clients)


def _balanced(y: Indices, clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """As `_dirichlet`, but a client that holds n / clients samples gets no more, and class indices are shuffled first.

    Source: Li et al., *Federated Learning on Non-IID Data Silos* (NIID-Bench), partition `noniid-labeldir`.
    """
    for _ in range(_TRIES):
        dealt: list[list[int]] = [[] for _ in range(clients)]
        for k in np.unique(y):
            of_class = rng.permutation(np.nonzero(y == k)[0])
            room = np.array([len(part) < len(y) / clients for part in dealt])
            shares = rng.dirichlet([alpha] * clients) * room
            if not shares.sum() > 0:
                break
            cuts = (np.cumsum(shares / shares.sum()) * len(of_class)).astype(int)[:-1]
            for part, piece in zip(dealt, np.split(of_class, cuts), strict=True):
                part.extend(piece.tolist())
        else:
            if min(map(len, dealt)) >= _LEAST:
                return [rng.permutation(np.array(part, np.int64)) for part in dealt]
    raise _hopeless(f"dirbal{alpha:g}", len(y), clients)


def _shards(y: Indices, clients: int, each: float, rng: np.random.Generator) -> list[Indices]:
    count = clients * int(each)
    size = len(y) // count
    if size == 0:
        raise ConfigError(f"partition shard{each:g}: {clients} clients need {count} samples, there are {len(y)}")
    by_label = np.argsort(y, kind="stable")[: size * count].reshape(count, size)
    return [by_label[shards].ravel() for shards in rng.permutation(count).reshape(clients, int(each))]


def _pathological(y: Indices, clients: int, each: float, rng: np.random.Generator) -> list[Indices]:
    classes = np.unique(y)
    if each > len(classes):
        raise ConfigError(f"partition path{each:g}: these data have {len(classes)} classes")
    owned = []
    for client in range(clients):
        first = client % len(classes)
        others = rng.permutation(np.delete(np.arange(len(classes)), first))[: int(each) - 1]
        owned.append({first, *others.tolist()})
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for k, label in enumerate(classes):
        owners = [client for client in range(clients) if k in owned[client]]
        of_class = rng.permutation(np.nonzero(y == label)[0])
        for client, piece in zip(owners, np.array_split(of_class, len(owners)) if owners else [], strict=True):
            parts[client].append(piece)
    return [np.concatenate(pieces) for pieces in parts]


def _skewed(y: Indices, clients: int, share: float, rng: np.random.Generator) -> list[Indices]:
    shuffled = rng.permutation(len(y))
    slices = np.array_split(shuffled[np.argsort(y[shuffled], kind="stable")], clients)
    mixed = [rng.permutation(part) for part in slices]
    kept = [round(share * len(part)) for part in mixed]
    pool = rng.permutation(np.concatenate([part[k:] for part, k in zip(mixed, kept, strict=True)]))
    starts = np.cumsum([len(part) - k for part, k in zip(mixed, kept, strict=True)])[:-1]
    dealt = np.split(pool, starts)
    return [np.concatenate([part[:k], more]) for part, k, more in zip(mixed, kept, dealt, strict=True)]


def _quantity(y: Indices, clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    for _ in range(_TRIES):
        cuts = (np.cumsum(rng.dirichlet([alpha] * clients)) * len(y)).astype(int)[:-1]
        parts = np.split(rng.permutation(len(y)), cuts)
        if min(map(len, parts)) >= _LEAST:
            return parts
    raise _hopeless(f"quantity{alpha:g}", len(y), clients)


def _by_id(ids: NDArray[Any], clients: int, rng: np.random.Generator, *, grouped: bool) -> list[Indices]:
    people = rng.permutation(np.unique(ids))
    if clients > len(people):
        raise ConfigError(f"partition: {clients} clients, but these data come from {len(people)} people")
    size = len(people) // clients if grouped else 1
    groups = np.split(people[: None if grouped else clients], [size * i for i in range(1, clients)])
    return [np.nonzero(np.isin(ids, group))[0] for group in groups]


def _hopeless(name: str, samples: int, clients: int) -> DataError:
    return DataError(
        f"partition {name}: in {_TRIES} tries no split of {samples} samples gave each of {clients} clients {_LEAST}; "
        "use fewer clients, a larger number, or another seed"
    )


_Make: TypeAlias = Callable[[Indices, int, float, np.random.Generator], list[Indices]]
_MAKERS: dict[str, _Make] = {
    "iid": _iid,
    "dir": _dirichlet,
    "dirbal": _balanced,
    "shard": _shards,
    "path": _pathological,
    "skew": _skewed,
    "quantity": _quantity,
}
