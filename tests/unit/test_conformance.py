"""Golden vectors in both directions, attacks, and a second reader that was written from SPEC.md alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.answers import Answers, check_update
from edge_runtime.received import Received
from tests.golden.cases import BLOBS, HELD, MASKED, MASKED_BLOBS, MASKS, MESSAGES, MODEL, ORDER, PACKED
from tests.golden.make import ATTACKS, GOLDEN, golden
from tests.support import models, second_blobs, second_masks, second_reader
from wire import codec, errors, messages, spec, structure, tensor, topics, zoo
from wire.maskfile import read_masks
from wire.masks import mask_digest, unpacked
from wire.schema import to_plain
from wire.spool import Spool

VECTORS = {name: bytes.fromhex(value) for name, value in json.loads(GOLDEN.read_text("utf-8")).items()}
HOSTILE = json.loads(ATTACKS.read_text("utf-8"))


def kind_of(message):
    return next(kind for kind, cls in codec.KINDS.items() if type(message) is cls)


def read_blob(folder, data, case=None):
    """Open bytes as a blob and look at all of it, with what the case says that the reader holds."""
    path = Path(folder) / "blob"
    path.write_bytes(data)
    coding = (case or {}).get("coding", tensor.PLAIN)
    held = {**({} if case is None else case.get("masks", {})), **coding.bases}
    with tensor.open_blob(path, outline=coding.outline) as blob:
        arrays = {name: blob.tensor(name, held.get(name)).copy() for name in blob.names}
        for name in blob.names:
            blob.sparse(name, held.get(name))
            blob.mask(name, held.get(name))
        return blob.kind, blob.meta, arrays


def test_every_case_has_a_vector_and_every_vector_is_still_written():
    packed = {f"packed:{name}" for name in PACKED}
    assert golden() == {name: data.hex() for name, data in VECTORS.items() if name not in packed}
    assert packed < set(VECTORS)


@pytest.mark.parametrize("name", MESSAGES)
def test_message_vectors_read_back(name):
    message = MESSAGES[name]
    assert codec.decode(VECTORS[f"message:{name}"], type(message)) == message


@pytest.mark.parametrize("name", MESSAGES)
def test_second_reader_reads_the_same_message(name):
    message = MESSAGES[name]
    assert second_reader.message(VECTORS[f"message:{name}"], kind_of(message)) == to_plain(message)


@pytest.mark.parametrize("name", [*(f"blob:{n}" for n in BLOBS if n != "values"), *(f"packed:{n}" for n in PACKED)])
def test_both_readers_read_the_same_blob(name, tmp_path):
    data = VECTORS[name]
    case = {**{f"blob:{n}": c for n, c in BLOBS.items()}, **{f"packed:{n}": c for n, c in PACKED.items()}}[name]
    kind, meta, arrays = read_blob(tmp_path, data, case)
    assert (kind, meta) == (case["kind"], case.get("meta", {}))
    coding = case.get("coding", tensor.PLAIN)
    held = {
        mask_digest(mask): mask.ravel().tolist() for mask in (*coding.bases.values(), *case.get("masks", {}).values())
    }
    outlines = {}
    if coding.outline is not None:
        lines = [(e.name, e.dtype, list(e.shape), e.kept, e.mask) for e in coding.outline.entries]
        outlines[second_blobs.outline_digest(lines)] = lines
    other_kind, other_meta, other = second_blobs.tensors(data, held, outlines)
    assert (other_kind, other_meta, list(other)) == (kind, meta, list(arrays))
    for tensor_name, (dtype, shape, values) in other.items():
        array = arrays[tensor_name]
        assert (array.dtype.name, array.shape) == (dtype, shape)
        assert np.array(values, array.dtype).tobytes() == array.tobytes()
        mask = case.get("masks", {}).get(tensor_name, True)
        exact = np.where(mask, case["tensors"][tensor_name], 0)
        assert np.allclose(array, exact, rtol=0, atol=2e-3) if coding.form else np.array_equal(array, exact)


def test_both_readers_read_values_with_the_mask(tmp_path):
    data, mask = VECTORS["blob:values"], BLOBS["values"]["masks"]["w"]
    assert second_blobs.mask_digest(mask.shape, mask.ravel().tolist()) == mask_digest(mask)
    _, _, other = second_blobs.tensors(data, {mask_digest(mask): mask.ravel().tolist()})
    (tmp_path / "x").write_bytes(data)
    with tensor.open_blob(tmp_path / "x") as blob:
        assert blob.tensor("w", mask).ravel().tolist() == other["w"][2]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_model_vectors_read_back(name):
    found = spec.decode(VECTORS[f"model:{name}"])
    assert found == zoo.by_name(name)
    assert second_reader.document(VECTORS[f"model:{name}"]) == to_plain(found)


def test_both_digest_rankings_and_join_shells_the_same_way():
    model = models.small_cnn()
    levels = {"a": np.array([2, 0, 1, 0, 2, 1], np.uint8), "b": np.arange(12, dtype=np.uint8) % 3}
    ranking = structure.ranking_digest(levels)
    assert ranking == second_blobs.ranking_digest({name: level.tobytes() for name, level in levels.items()})
    widest = spec.Structure(2, structure.widths_of(levels, 3), ranking)
    arrays = models.random_arrays(model, spec.Structure())
    whole = structure.to_wire(model, arrays, levels)
    shells = [structure.shell(model, whole, widest.narrowed(k)) for k in range(3)]
    for capacity in range(3):
        sizes = [spec.group_sizes(model, widest.narrowed(k)) for k in range(capacity + 1)]
        ours = structure.assemble(model, widest.narrowed(capacity), shells[: capacity + 1])
        for weights in model.tensors:
            axes = [(axis.group, axis.outer, axis.inner) for axis in weights.axes]
            lines = [shells[k].get(weights.name, np.empty(0)).tolist() for k in range(capacity + 1)]
            joined = second_blobs.join_shells(axes, sizes, lines)
            assert len(joined) == ours[weights.name].size
            assert all(ours[weights.name][index] == value for index, value in joined.items())


def read_masked(reader, folder, data):
    """Read bytes as a blob of the masked model in `cases`: by the code that a device or a coordinator reads it with."""
    path = Path(folder) / "masked"
    path.write_bytes(data)
    if reader == "masks":
        return {name: unpacked(mask) for name, mask in read_masks(str(path), MODEL, MASKED).masks.items()}
    if reader == "shell":
        return dict(Received(MODEL, MASKED, [str(path)], HELD).lines())
    return check_update(path, MODEL, MASKED, HELD)


def read_masked_otherwise(reader, data):
    shapes = {name: list(shape) for name, shape in spec.tensor_shapes(MODEL, spec.Structure()).items()}
    held = {name: mask.ravel().tolist() for name, mask in MASKS.items()}
    if reader == "masks":
        return second_masks.masks(data, shapes, MASKED.masks, dict(MASKED.kept))
    return (second_masks.shell if reader == "shell" else second_masks.update)(data, shapes, held)


def read_otherwise(reader, kind, data):
    if reader == "message":
        second_reader.message(data, kind)
    elif reader == "blob":
        second_blobs.tensors(data)
    else:
        read_masked_otherwise(reader, data)


def test_both_readers_name_and_read_the_same_masks(tmp_path):
    shapes = {"o.weight": [5, 7], "o.bias": [5]}
    held = {name: mask.ravel().tolist() for name, mask in MASKS.items()}
    assert MASKED.masks == second_blobs.masks_digest({name: (shapes[name], mask) for name, mask in held.items()})
    assert HELD.outline.digest == second_blobs.outline_digest(second_masks.model_outline(shapes, held))
    assert second_blobs.masks_digest({}) == structure.masks_digest({}) == ""
    data = VECTORS["blob:masks"]
    found = read_masked("masks", tmp_path, data)
    assert {name: mask.ravel().tolist() for name, mask in found.items()} == read_masked_otherwise("masks", data) == held


def test_both_readers_read_the_same_masked_shell(tmp_path):
    data = VECTORS["blob:masked-shell"]
    other = read_masked_otherwise("shell", data)
    for name, line in read_masked("shell", tmp_path, data).items():
        whole = np.array(other[name], np.float32).reshape(HELD.masks.get(name, line).shape)
        assert line.tolist() == (whole[HELD.masks[name]] if name in HELD.masks else whole).tolist()
        assert line.tobytes() == MASKED_BLOBS["masked-shell"]["tensors"][name].tobytes()


@pytest.mark.parametrize("name", [name for name, case in MASKED_BLOBS.items() if case["kind"] == "update"])
def test_both_readers_read_the_same_masked_update(name, tmp_path):
    data, case = VECTORS[f"blob:{name}"], MASKED_BLOBS[name]
    read_masked("update", tmp_path, data)
    moved, told = read_masked_otherwise("update", data)
    spool = Spool(tmp_path / "spool")
    reply = messages.Reply(ORDER, "d", ORDER, MASKED, spool.add_bytes(data), "", 1, {}, messages.Usage())
    (answer,) = Answers(spool, MODEL, (reply,), HELD)
    assert {key: array.ravel().tolist() for key, array in answer.update.items()} == moved
    assert set(answer.extras) == set(told)
    for key, (places, values) in answer.extras.items():
        assert values.tobytes() == case["tensors"][f"z/{key}"].tobytes(), "what is told keeps its own type"
        assert {i: v for i, v in enumerate(told[key]) if v} == {
            int(i): float(v) for i, v in zip(places, values, strict=True) if v
        }
    for key, mask in answer.sent.items():
        wanted = case.get("masks", {}).get(key, MASKS.get(key))
        np.testing.assert_array_equal(mask, wanted)


def attack(reader, data, folder):
    if reader == "blob":
        read_blob(folder, data)
    elif reader in ("masks", "shell", "update"):
        read_masked(reader, folder, data)
    elif reader == "model":
        spec.decode(data)
    else:
        codec.decode(data, codec.KINDS[reader.partition(":")[2]])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_by_name(name, tmp_path):
    case = HOSTILE[name]
    with pytest.raises(getattr(errors, case["error"])) as caught:
        attack(case["reader"], bytes.fromhex(case["hex"]), tmp_path)
    assert type(caught.value).__name__ == case["error"]
    assert len(str(caught.value)) < 1000, "an error text must not carry the attack along"


@pytest.mark.parametrize("name", [name for name, case in HOSTILE.items() if case["reader"] != "model"])
def test_second_reader_refuses_the_same(name):
    case = HOSTILE[name]
    data = bytes.fromhex(case["hex"])
    reader, _, kind = case["reader"].partition(":")
    with pytest.raises(second_reader.Wrong) as caught:
        read_otherwise(reader, kind, data)
    assert str(caught.value).split()[0] == case["error"]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(VECTORS)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.integers(0, 1 << 20),
)
def test_damaged_bytes_are_read_or_refused_but_never_anything_else(name, changes, end, tmp_path_factory):
    data = bytearray(VECTORS[name])
    for place, value in changes:
        data[place % len(data)] = value
    if end < 1 << 18:
        del data[end % len(data) :]
    room, _, rest = name.partition(":")
    reader = f"message:{kind_of(MESSAGES[rest])}" if room == "message" else room.replace("packed", "blob")
    reader = MASKED_BLOBS[rest]["kind"] if rest in MASKED_BLOBS else reader
    with contextlib.suppress(errors.PeerError, errors.SpecError):
        attack(reader, bytes(data), tmp_path_factory.getbasetemp())


def test_spec_and_code_agree_on_limits_and_topics():
    text = (Path(tensor.__file__).parent / "SPEC.md").read_text("utf-8")
    for number in ("65,536", "61,440", "262,144", "1,048,576", "49,152", "16,384"):
        assert number in text
    for reason in second_reader.REASONS:
        assert f"`{reason}`" in text
    for topic in (topics.lead("F"), topics.presence("F", "D"), topics.down("F", "D", "order")):
        assert f"`{topic}`" in text
    assert topics.up_piece("F", "D", "X", 3) == "e1/F/u/0/D/X/3"
