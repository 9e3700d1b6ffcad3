"""What the golden bytes say. New cases are added by hand here and by ``python -m tests.golden.make`` to the file."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.support.models import linear
from wire import messages as m
from wire.maskfile import Held, outline_of_model
from wire.masks import mask_digest
from wire.outline import outline_of
from wire.spec import Structure
from wire.structure import masked
from wire.tensor import Coding

ORDER, BOOT, RUN = "0123456789abcdef", "00000000000000b0", "00000000000000a1"
DIGEST = "ab" * 32
WIDTHS = Structure(1, {"conv1": (8, 16, 32), "fc2": (100, 200, 400)}, "cd" * 32)

MESSAGES = {
    "lead": m.Lead("online", BOOT, RUN, 2.5),
    "presence-online": m.Presence(
        "pi-1", "online", BOOT, 7, m.Caps("0.1.0", ("torch", "native"), 50_331_648, 4, 1437, 10, (1, 8, 8))
    ),
    "presence-lost": m.Presence("pi-1", "lost", BOOT, 7),
    "beat": m.Beat(BOOT, 7, ORDER, 0.25, 12_345_678),
    "order": m.Order(
        id=ORDER,
        run=RUN,
        round=3,
        device="pi-1",
        verb="train",
        spec=m.BlobRef(DIGEST, 1589),
        shells=(m.BlobRef("01" * 32, 65_536), m.BlobRef("02" * 32, 1, 4096)),
        structures=(WIDTHS,),
        recipe=m.Recipe(epochs=2, rate=0.1, momentum=0.9, clip=1.0, seed=2**40, knobs={"widths": 2}),
        bytes_peak=20_000_000,
        seconds=60.0,
    ),
    "order-plain": m.Order(
        ORDER, RUN, 1, "pi_2", "evaluate", m.BlobRef(DIGEST, 1), (m.BlobRef(DIGEST, 2),), (Structure(),), m.Recipe()
    ),
    "order-masked": m.Order(
        id=ORDER,
        run=RUN,
        round=4,
        device="pi-1",
        verb="train",
        spec=m.BlobRef(DIGEST, 1589),
        shells=(m.BlobRef("03" * 32, 321),),
        structures=(Structure(masks="ef" * 32, kept={"fc1.weight": 23_520, "out.weight": 0}),),
        recipe=m.Recipe(rule="topk", steps=40, loss="binary_cross_entropy", knobs={"adam": 1.0}, form="int8"),
        masks=m.BlobRef("04" * 32, 9876, 4096),
    ),
    "order-nested-masked": m.Order(
        ORDER,
        RUN,
        5,
        "pi-1",
        "train",
        m.BlobRef(DIGEST, 1589),
        (m.BlobRef("03" * 32, 321),),
        (dataclasses.replace(WIDTHS.narrowed(0), masks="ef" * 32, kept={"fc1.weight": 2_352}),),
        m.Recipe(rule="fiarse"),
        masks=m.BlobRef("04" * 32, 987),
    ),
    "reply": m.Reply(
        order=ORDER,
        device="pi-1",
        boot=BOOT,
        structure=WIDTHS.narrowed(0),
        update=m.BlobRef(DIGEST, 123_456),
        keep="ef" * 32,
        samples=1437,
        metrics={"loss": 0.5, "accuracy.after": 0.984375},
        usage=m.Usage(190_000_000, 23_000_000, 50_331_648, 1.5, 32, "torch"),
    ),
    "reply-without-update": m.Reply(ORDER, "pi-1", BOOT, Structure(), None, "", 0, {}, m.Usage()),
    "refusal": m.Refusal(ORDER, "pi-1", BOOT, "memory", "needs 60 MiB, has 48 MiB \u2713", 62_914_560, 50_331_648),
    "ack": m.Ack(ORDER, "more", b"\xff\x03"),
    "ack-committed": m.Ack(ORDER, "committed"),
    "need": m.Need(DIGEST, ORDER),
    "cancel": m.Cancel(ORDER, "the run is over"),
    "signed": m.Signed(b"\x81\xa1v\x01", b"\x30\x82", bytes(range(64))),
    "csr": m.Csr("pi-1", b"\x30\x81\x00", b"0123456789abcdef"),
    "csr-renewal": m.Csr("pi-1", b"\x30\x81\x00"),
    "cert": m.Cert(DIGEST, "granted", b"-----BEGIN CERTIFICATE-----\n", 2_592_000.0),
    "cert-refused": m.Cert(DIGEST, "expired", detail="ask for another one"),
}

_EYE = np.eye(5, 7, dtype=np.bool_)
_SPARSE = np.arange(35, dtype=np.float32).reshape(5, 7)
_THIN = np.zeros((40, 3, 5), np.bool_)
_THIN[[0, 7, 39], [2, 0, 1], [4, 0, 3]] = True
_ROW = np.zeros(70_000, np.bool_)
_ROW[[1, 69_999]] = True

_FEW = np.zeros(1000, np.bool_)
_FEW[[0, 1, 5, 260, 515, 770, 999]] = True
_FEWER = _FEW.copy()
_FEWER[[5, 6]] = [False, True]
_LONG = np.arange(1000, dtype=np.float32) / 8
_VALUES = (np.arange(300, dtype=np.float32) * 7 % 37 - 18) / np.float32(53)
_RANDOM = np.random.default_rng(5).random((2, 40, 50))
_BLOCKS = np.repeat(_RANDOM[:, :, :10] < 0.5, 5, axis=2)
_COLUMNS = np.broadcast_to(np.arange(50) % 11 == 3, (2, 40, 50)).copy()
_STRANGE = _RANDOM < 0.5

BLOBS = {
    "nothing": {"kind": "empty", "tensors": {}},
    "dense": {
        "kind": "update",
        "tensors": {
            "fc.weight": np.array([[1.5, -2.0, 0.0], [np.float32(0.1), 1e-40, 3e38]], np.float32),
            "fc.bias": np.array([-0.0], np.float32),
        },
    },
    "types": {
        "kind": "state",
        "meta": {"round": 3, "widths": {"a": [1, 2]}, "spec": b"\x00\x01"},
        "tensors": {
            "l/a": np.array([0, 1, 255], np.uint8),
            "x/f8": np.array([[0.1]], np.float64),
            "x/i4": np.array([-1, 2**31 - 1], np.int32),
            "x/i8": np.array([-(2**63), 2**63 - 1], np.int64),
            "x/u4": np.array([2**32 - 1], np.uint32),
            "x/none": np.zeros((0, 4), np.float32),
            "x/scalar": np.array(7.0, np.float32),
        },
    },
    "bitmap": {"kind": "update", "tensors": {"w": _SPARSE}, "masks": {"w": _EYE}, "coding": Coding(pack=False)},
    "index": {
        "kind": "update",
        "tensors": {"w": np.arange(600, dtype=np.float32).reshape(40, 3, 5), "row": np.ones(70_000, np.float32)},
        "masks": {"w": _THIN, "row": _ROW},
        "coding": Coding(pack=False),
    },
    "values": {
        "kind": "update",
        "tensors": {"w": _SPARSE},
        "masks": {"w": _EYE},
        "coding": Coding(known={"w": mask_digest(_EYE)}),
    },
    "gaps": {"kind": "update", "tensors": {"w": _LONG}, "masks": {"w": _FEW}},
    "rice": {"kind": "update", "tensors": {"w": _LONG}, "masks": {"w": _RANDOM.ravel()[:1000] < 0.1}},
    "delta": {
        "kind": "update",
        "tensors": {"w": _LONG},
        "masks": {"w": _FEW},
        "coding": Coding(bases={"w": _FEWER}),
    },
    "outline": {
        "kind": "update",
        "tensors": {"w": _SPARSE, "b": np.array([0.5, -1.0], np.float32), "i": np.array([7], np.int64)},
        "masks": {"w": _EYE},
        "coding": Coding(
            outline=outline_of(
                {"w": _SPARSE, "b": np.array([0.5, -1.0], np.float32), "i": np.array([7], np.int64)}, {"w": _EYE}
            )
        ),
    },
    "norms-own": {
        "kind": "shell",
        "meta": {"capacity": 0, "ranking": "ab" * 32},
        "tensors": {"n.mean": np.array([0.5, -1.0], np.float32), "n/n.mean": np.array([0.25, 2.0], np.float32)},
    },
    "norms-observed": {
        "kind": "update",
        "tensors": {
            f"n/{k}/n.{role}": np.arange(2 + k, dtype=np.float32) for k in (0, 1) for role in ("mean", "variance")
        },
    },
    **{
        form: {"kind": "update", "tensors": {"w": _VALUES, "b": _VALUES[:3]}, "coding": Coding(form=form)}
        for form in ("bfloat16", "float16", "int8")
    },
}

MODEL = linear(7, 5)
MASKS = {"o.weight": _EYE}
MASKED = masked(MASKS)
HELD = Held(MASKS, outline_of_model(MODEL, MASKS))
"""A model, its masks, the structure that they make, and what both sides then hold."""

_MOVES = {"o.weight": np.array([0.5, -1.0, 0.0, 1e-3, 3.0], np.float32), "o.bias": np.arange(5, dtype=np.float32) / 7}
_TOLD = {"z/o.weight": np.array([0.25, 1e-30, 7.0], np.float32), "z/o.bias": np.arange(5, dtype=np.float32) / 3}
_PLACES = np.zeros((5, 7), np.bool_)
_PLACES.reshape(-1)[[1, 8, 34]] = True
_KNOWN = {"o.weight": mask_digest(_EYE)}

MASKED_BLOBS = {
    "masks": {
        "kind": "masks",
        "tensors": {"o.weight": np.ones(5, np.float32)},
        "masks": MASKS,
        "coding": Coding(form="ones"),
    },
    "masked-shell": {
        "kind": "shell",
        "meta": {"capacity": 0},
        "tensors": _MOVES,
        "coding": Coding(outline=HELD.outline),
    },
    "masked-update": {"kind": "update", "tensors": _MOVES, "coding": Coding(outline=HELD.outline)},
    "masked-update-int8": {"kind": "update", "tensors": _MOVES, "coding": Coding(outline=HELD.outline, form="int8")},
    "update-with-extras": {
        "kind": "update",
        "tensors": {**_MOVES, **_TOLD},
        "masks": {**MASKS, "z/o.weight": _PLACES},
        "coding": Coding(known=_KNOWN, form="bfloat16", exact=frozenset(_TOLD)),
    },
    "update-of-one-tensor": {
        "kind": "update",
        "tensors": {"o.weight": np.array([1.0, 2.0], np.float32)},
        "masks": {"o.weight": _SPARSE > 32},
    },
}
"""Blobs of a masked model, each written as its own writer does: kept values alone."""

PACKED = {
    name: {
        "kind": "update",
        "tensors": {"w": np.arange(4000, dtype=np.float32).reshape(2, 40, 50)},
        "masks": {"w": mask},
        "coding": Coding(bases={"w": mask ^ _COLUMNS} if name == "delta" else {}),
    }
    for name, mask in (("bits", _BLOCKS), ("gaps", _COLUMNS), ("delta", _STRANGE))
}
"""Blobs with packed parts. Another zstandard may pack them otherwise, so that their vectors are read but not written again."""
