"""How masks and values become few bytes: gaps, packing, forms, outlines, and what they may cost at most."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden.attacks import container
from wire import coding, forms, gaps, masks, rice, zstd
from wire.errors import DigestMismatch, Malformed, MaskUnknown, NonFinite, TooLarge, Unsupported
from wire.masks import mask_digest
from wire.outline import outline_of
from wire.tensor import Coding, open_blob, write_blob

MASKS = hnp.arrays(np.bool_, st.integers(0, 3000), elements=st.sampled_from([False] * 9 + [True]))
ROUNDED = tuple(form for form in forms.FORMS if form not in ("", "ones"))
"""Forms that say values, more or less."""
FLOATS = hnp.arrays(np.float32, st.integers(0, 900), elements=st.floats(-1e4, 1e4, width=32))


def naive_gaps(mask):
    """Say each gap as SPEC.md, section 6, does; one element at a time."""
    data, passed = [], 0
    for keep in mask:
        if keep:
            data += [255] * (passed // 255) + [passed % 255]
            passed = 0
        else:
            passed += 1
    return bytes(data)


def random_mask(density, count=1 << 16, seed=1):
    return np.random.default_rng(seed).random(count) < density


def mask_bytes(mask, **how):
    """Give the encoding and the bytes of the mask's own parts."""
    array = np.zeros(mask.shape, np.float32)
    given = {"form": "", "known": "", "base": None, "pack": True, **how}
    coded = coding.code_masked(array, mask, **given)
    return coded.encoding, coding.cost(coded) - forms.size("", coded.kept, 4)


# --- gaps ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(MASKS)
def test_gaps_are_those_of_the_text_and_come_back(mask):
    values = np.arange(len(mask), dtype=np.int32)
    data, kept = gaps.to_gaps(mask, values)
    assert data == naive_gaps(mask)
    assert len(data) <= gaps.longest(len(mask), int(mask.sum()))
    np.testing.assert_array_equal(kept, values[mask])
    np.testing.assert_array_equal(gaps.from_gaps(data, len(mask), int(mask.sum()), "$"), np.flatnonzero(mask))


@pytest.mark.parametrize("density", [0.00005, 0.02, 0.07, 0.4])
def test_gaps_cross_the_borders_of_what_is_looked_at_together(density):
    step = gaps._AT_ONCE
    mask = random_mask(density, 2 * step + 3)
    mask[[step - 1, step, 2 * step - 1]] = True
    values = np.random.default_rng(0).standard_normal(len(mask)).astype(np.float32)
    data, kept = gaps.to_gaps(mask, values)
    assert data == naive_gaps(mask)
    np.testing.assert_array_equal(kept, values[mask])
    np.testing.assert_array_equal(np.concatenate([*gaps.runs_of(data, len(mask), -1, "$")]), np.flatnonzero(mask))


def test_positions_are_read_into_the_one_line_that_is_given():
    mask = random_mask(0.3, 1 << 21)
    data, _ = gaps.to_gaps(mask)
    kept = int(mask.sum())
    tracemalloc.start()
    places = gaps.from_gaps(data, len(mask), kept, "$")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(places, np.flatnonzero(mask))
    assert peak < 8 * kept + (1 << 20)


@settings(deadline=None)
@given(MASKS.filter(np.any))
def test_rice_codes_come_back(mask):
    data, low = rice.to_rice(np.flatnonzero(mask))
    kept = int(mask.sum())
    assert len(data) <= rice.longest(len(mask), kept, low)
    np.testing.assert_array_equal(
        rice.from_rice(np.frombuffer(data, np.uint8), len(mask), kept, low, "$"), np.flatnonzero(mask)
    )
    gaps_ = [b - a - 1 for a, b in itertools.pairwise([-1, *np.flatnonzero(mask).tolist()])]
    unary = "".join("0" * (gap >> low) + "1" for gap in gaps_)
    rest = "".join(str(gap >> bit & 1) for gap in gaps_ for bit in range(low))
    line = [part[i : i + 8][::-1] for part in (unary, rest) for i in range(0, len(part), 8)]
    assert data == bytes(int(bits, 2) for bits in line)


@pytest.mark.parametrize("library", ["package", "standard"])
def test_a_frame_is_taken_only_as_what_it_must_be(library, monkeypatch):
    if library == "standard":
        name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
        monkeypatch.setattr(zstd, "_standard", importlib.import_module(name), raising=False)
        monkeypatch.setattr(zstd, "_package", None)
    data = bytes(1000)
    frame = zstd.pack(data)
    assert zstd.unpack(frame, 1000, "$") == data
    for size in (999, 1001, 1 << 40):
        with pytest.raises(TooLarge):
            zstd.unpack(frame, size, "$")
    for bad in (b"", frame[:-1], frame + b"x", frame + frame, b"x" + frame, frame[:4]):
        with pytest.raises((Malformed, TooLarge)):
            zstd.unpack(bad, 1000, "$")
    with pytest.raises(Malformed):
        zstd.unpack(zstd.pack(b""), 0, "$")


def test_a_bomb_costs_its_reader_nothing(tmp_path):
    """32 KB that unpack to 1 GiB, in the frame's own words: refused within 16 MiB."""
    code = """
import sys, numpy, zstandard
from pathlib import Path
from tests.golden.attacks import container
from wire.errors import PeerError
from wire.tensor import open_blob
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
packer = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 30)
bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()
assert len(bomb) < 40_000
for count in (1 << 33, 1 << 20, 8):
    entry = {"name": "w", "dtype": "float32", "shape": [count], "encoding": "bitmap", "parts": [0, 1], "kept": 0}
    data = container({"v": 1, "kind": "u", "meta": {}, "tensors": [{**entry, "packed": count // 8}]}, [bomb, b""])
    Path(sys.argv[1]).write_bytes(data)
    before = peak()
    try:
        with open_blob(Path(sys.argv[1])) as blob:
            blob.sparse("w")
    except PeerError as error:
        print(type(error).__name__, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["TooLarge"] * 3
    assert max(int(grown) for _, grown in lines) < 16 << 10


# --- what a mask costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.02, 0.05, 0.1, 0.15, 0.17, 0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("count", [1 << 16, 1 << 20])
def test_a_random_mask_is_within_5_percent_of_its_entropy(density, count):
    mask = random_mask(density, count)
    bound = coding.entropy(mask.mean()) * count / 8
    encoding, spent = mask_bytes(mask)
    assert spent <= 1.05 * bound
    assert spent <= -(-count // 8)
    assert spent <= masks.index_bytes((256, count // 256), int(mask.sum()))
    if count * density > rice.KEPT_MAX:
        assert encoding == ("gaps" if density < 0.17 else "bitmap")


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("count", [1, 40, 500, 5000])
def test_small_masks_stay_close(density, count):
    mask = random_mask(density, count)
    bound = coding.entropy(mask.mean()) * count / 8
    assert mask_bytes(mask)[1] <= min(1.05 * bound + 32, -(-count // 8), 4 * mask.sum())


def shapes_of_masks():
    rng = np.random.default_rng(3)
    rows = np.zeros((512, 512), np.bool_)
    rows[rng.choice(512, 51, replace=False)] = True
    yield "rows", rows
    yield "columns", np.ascontiguousarray(rows.T)
    blocks = np.kron(rng.random((64, 64)) < 0.1, np.ones((8, 8), np.bool_)).astype(np.bool_)
    yield "blocks", blocks
    half = np.zeros((512, 512), np.bool_)
    half[:256, :100] = True
    yield "corner", half
    clustered = rng.random((512, 512)) < np.where(rng.random((512, 1)) < 0.2, 0.5, 0.01)
    yield "clustered", clustered
    per_layer = rng.random((512, 512)) < np.linspace(0.001, 0.4, 512)[:, None]
    yield "gradient", per_layer


@pytest.mark.parametrize(("name", "mask"), list(shapes_of_masks()))
def test_a_mask_with_a_pattern_beats_the_bound_of_random_ones(name, mask):
    bound = coding.entropy(mask.mean()) * mask.size / 8
    _, spent = mask_bytes(mask)
    assert spent < bound, name
    if name in ("rows", "columns", "corner"):
        assert spent < bound / 10, name


@settings(deadline=None, max_examples=60)
@given(st.data(), hnp.array_shapes(min_dims=1, max_dims=3, max_side=30))
def test_never_more_than_any_encoding_of_the_papers(data, shape):
    mask = data.draw(hnp.arrays(np.bool_, shape))
    array = np.ones(shape, np.float32)
    coded = coding.code_masked(array, mask, form="", known="", base=None, pack=True)
    least = min(coding.plain_cost(e, shape, int(mask.sum()), 4) for e in ("dense", "bitmap", "index"))
    assert coding.cost(coded) <= least


# --- known masks, changes, outlines ----------------------------------------------------------------------------------


def test_a_small_change_of_a_mask_travels_as_a_change(tmp_path):
    rng = np.random.default_rng(7)
    old = random_mask(0.1, 1 << 18).reshape(512, 512)
    new = old.copy()
    new.flat[rng.choice(new.size, 400, replace=False)] ^= True
    array = rng.standard_normal(new.shape).astype(np.float32)
    whole = write_blob(tmp_path / "a", "update", {"w": array}, masks={"w": new})
    change = write_blob(tmp_path / "b", "update", {"w": array}, masks={"w": new}, coding=Coding(bases={"w": old}))
    values = 4 * int(new.sum())
    assert change.size - values < (whole.size - values) / 10
    with open_blob(tmp_path / "b") as blob:
        assert blob.entry("w").encoding == "delta"
        np.testing.assert_array_equal(blob.mask("w", old), new)
        np.testing.assert_array_equal(blob.tensor("w", old), np.where(new, array, 0))
        with pytest.raises(MaskUnknown):
            blob.tensor("w")
        with pytest.raises(DigestMismatch):
            blob.tensor("w", new)
    unlike = random_mask(0.1, 1 << 18, seed=9).reshape(512, 512)
    write_blob(tmp_path / "c", "update", {"w": array}, masks={"w": new}, coding=Coding(bases={"w": unlike}))
    with open_blob(tmp_path / "c") as blob:
        assert blob.entry("w").encoding in ("gaps", "rice")


def test_a_delta_that_does_not_add_up_is_refused(tmp_path):
    base = np.zeros(100, np.bool_)
    base[:10] = True
    entry = {"name": "w", "dtype": "float32", "shape": [100], "encoding": "delta", "parts": [0, 1]}
    for kept, flips in ((10, b"\0"), (9, b"\x0a"), (9, b"\xff"), (9, b"\x64")):
        head = {"v": 1, "kind": "u", "meta": {}, "tensors": [{**entry, "kept": kept, "mask": mask_digest(base)}]}
        (tmp_path / "x").write_bytes(container(head, [flips, bytes(4 * kept)]))
        with open_blob(tmp_path / "x") as blob, pytest.raises(Malformed):
            blob.tensor("w", base)


def test_a_round_of_values_costs_little_more_than_the_values(tmp_path):
    shapes = {"fc1.weight": (300, 784), "fc1.bias": (300,), "fc2.weight": (100, 300), "fc2.bias": (100,)}
    shapes |= {"fc3.weight": (10, 100), "fc3.bias": (10,)}
    rng = np.random.default_rng(1)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    kept = {name: rng.random(shape) < 0.1 for name, shape in shapes.items() if len(shape) > 1}
    outline = outline_of(arrays, kept)
    ref = write_blob(tmp_path / "x", "update", arrays, masks=kept, coding=Coding(outline=outline))
    values = 4 * sum(int(kept[n].sum()) if n in kept else a.size for n, a in arrays.items())
    assert ref.size <= values + 64 * len(shapes)
    with open_blob(tmp_path / "x", outline=outline_of(arrays, kept)) as blob:
        assert blob.names == tuple(shapes)
        for name, array in arrays.items():
            np.testing.assert_array_equal(blob.tensor(name, kept.get(name)), np.where(kept.get(name, True), array, 0))
    with pytest.raises(MaskUnknown, match=outline.digest.hex()):
        open_blob(tmp_path / "x")
    with pytest.raises(MaskUnknown):
        open_blob(tmp_path / "x", outline=outline_of(arrays, {}))
    with pytest.raises(DigestMismatch):
        write_blob(tmp_path / "y", "update", arrays, masks={}, coding=Coding(outline=outline))


# --- forms -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(FLOATS, st.sampled_from(ROUNDED))
def test_forms_come_back_as_close_as_they_can(values, form):
    said = forms.written(values, form).view(np.uint8)
    assert len(said) == forms.size(form, len(values), 4)
    back = forms.read(said, form, len(values))
    assert back.dtype == np.float32
    blocks = np.repeat([np.abs(values[i : i + 256]).max(initial=0) for i in range(0, len(values), 256)] or [0.0], 256)[
        : len(values)
    ]
    bound = {
        "bfloat16": np.abs(values) / 256 + 1e-38,
        "float16": np.abs(values) / 2048 + 6e-8,
        "int8": blocks / 253 + 1e-40,
    }
    assert (np.abs(back - values) <= bound[form]).all()
    np.testing.assert_allclose(forms.lost(values, form) + back, values, rtol=1e-6, atol=1e-37)
    again = forms.written(back, form).view(np.uint8)
    if form != "int8":
        assert again.tobytes() == said.tobytes(), "what was said once is said the same way again"


@pytest.mark.parametrize("form", ROUNDED)
def test_forms_cross_the_borders_of_what_is_looked_at_together(form):
    values = np.random.default_rng(8).standard_normal(2 * forms._AT_ONCE + 300).astype(np.float32)
    said = forms.written(values, form).view(np.uint8)
    back = forms.read(said, form, len(values))
    assert np.abs(back - values).max() < 0.03
    np.testing.assert_array_equal(forms.lost(values, form), values - back)
    for start in (forms._AT_ONCE - 256, forms._AT_ONCE, 2 * forms._AT_ONCE):
        part = values[start : start + 256]
        alone = forms.read(forms.written(part, form).view(np.uint8), form, 256)
        np.testing.assert_array_equal(back[start : start + 256], alone)


def test_a_rice_code_is_for_small_masks_and_cheap_to_read():
    assert rice.to_rice(np.array([(1 << 25) + 4]))[1] in (rice.LOW_MAX - 1, rice.LOW_MAX)
    code = np.ones(rice.KEPT_MAX * 21 // 8, np.uint8)
    tracemalloc.start()
    with pytest.raises(Malformed):
        rice.from_rice(code, 1 << 40, rice.KEPT_MAX, 20, "$")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_bfloat16_rounds_to_even_and_keeps_what_is_no_number():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001], np.uint32)
    said = forms.written(bits.view(np.float32), "bfloat16")
    assert [hex(x) for x in said[:6]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0x7f80", "0xff80"]
    assert np.isnan(forms.read(said.view(np.uint8), "bfloat16", 7)[6])


def test_float16_stops_at_its_largest_value_and_int8_refuses_what_it_cannot_say():
    values = np.array([1e6, -1e6, 1.0], np.float32)
    assert forms.read(forms.written(values, "float16").view(np.uint8), "float16", 3).tolist() == [
        65504.0,
        -65504.0,
        1.0,
    ]
    for bad in (np.inf, np.nan):
        with pytest.raises(NonFinite):
            forms.written(np.array([0.0, bad], np.float32), "int8")
    with pytest.raises(Unsupported, match="bfloat16"):
        forms.written(values, "float8")


def test_errors_that_are_carried_over_do_not_add_up():
    """Error feedback: the sum of what was said stays within one step of the sum of what was meant."""
    rng = np.random.default_rng(2)
    meant, said, carried = np.zeros(1000, np.float32), np.zeros(1000), np.zeros(1000, np.float32)
    for _ in range(50):
        update = rng.standard_normal(1000).astype(np.float32)
        meant += update
        total = update + carried
        carried = forms.lost(total, "int8")
        said += total - carried
    assert np.abs(said - meant).max() < 0.1


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("masked", [False, True])
def test_blobs_in_other_forms(tmp_path, form, masked):
    rng = np.random.default_rng(4)
    arrays = {"w": rng.standard_normal((30, 40)).astype(np.float32), "n": np.arange(5, dtype=np.int64)}
    kept = {"w": rng.random((30, 40)) < 0.2} if masked else {}
    full = write_blob(tmp_path / "x", "update", arrays, masks=kept)
    less = write_blob(tmp_path / "y", "update", arrays, masks=kept, coding=Coding(form=form))
    assert less.size < full.size
    with open_blob(tmp_path / "y") as blob:
        assert blob.entry("w").form == form
        assert (blob.entry("n").form, blob.tensor("n").tolist()) == ("", [0, 1, 2, 3, 4])
        found = blob.tensor("w")
        assert not found.flags.writeable
        np.testing.assert_allclose(found, np.where(kept.get("w", True), arrays["w"], 0), atol=0.02)
        blob.require_finite()
    with pytest.raises(TooLarge):
        open_blob(tmp_path / "y", elements_max=100)
