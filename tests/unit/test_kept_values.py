"""Tensors that are their masks, kept values that are written without the arrays they are of, and values that stay exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire import forms
from wire.errors import DigestMismatch, Malformed, TooLarge
from wire.masks import mask_digest
from wire.outline import outline_of
from wire.tensor import Coding, open_blob, write_blob

ROUNDED = tuple(form for form in forms.FORMS if form not in ("", "ones"))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_a_tensor_of_ones_costs_its_mask_and_nothing_else(tmp_path, density):
    mask = np.random.default_rng(1).random((60, 100)) < density
    ones = np.ones(int(mask.sum()), np.float32)
    ref = write_blob(tmp_path / "x", "masks", {"w": ones}, masks={"w": mask}, coding=Coding(form="ones"))
    assert ref.size <= 400 + 6000 // 8
    with open_blob(tmp_path / "x") as blob:
        entry = blob.entry("w")
        assert (entry.form, entry.kept, entry.shape) == ("ones", mask.sum(), (60, 100))
        assert entry.encoding != "dense", "a reader that makes no values still gets a mask"
        np.testing.assert_array_equal(blob.mask("w"), mask)
        np.testing.assert_array_equal(blob.tensor("w"), mask.astype(np.float32))
        np.testing.assert_array_equal(blob.values("w"), ones)
        blob.require_finite()
    with pytest.raises(TooLarge):
        open_blob(tmp_path / "x", elements_max=5999)


@settings(deadline=None, max_examples=60)
@given(st.data(), hnp.array_shapes(min_dims=1, max_dims=3, max_side=20), st.sampled_from(["", *ROUNDED]))
def test_kept_values_alone_give_the_same_bytes_as_whole_arrays(tmp_path_factory, data, shape, form):
    mask = data.draw(hnp.arrays(np.bool_, shape))
    base = data.draw(st.sampled_from([None, mask, ~mask]))
    whole = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    folder = tmp_path_factory.getbasetemp()
    known = {"w": mask_digest(mask)} if data.draw(st.booleans()) else {}
    how = Coding(form=form, known=known, bases={} if base is None or known else {"w": base})
    for name, array in (("a", whole), ("b", whole[mask])):
        write_blob(folder / name, "update", {"w": array}, masks={"w": mask}, coding=how)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_kept_values_alone_against_an_outline(tmp_path):
    mask = np.random.default_rng(1).random((20, 30)) < 0.2
    whole = {"w": np.arange(600, dtype=np.float32).reshape(20, 30), "b": np.ones(20, np.float32)}
    lines = {"w": whole["w"][mask], "b": whole["b"]}
    outline = outline_of(whole, {"w": mask})
    for form in ("", *ROUNDED):
        how = Coding(outline=outline, form=form)
        refs = {
            write_blob(tmp_path / "a", "u", whole, masks={"w": mask}, coding=how),
            write_blob(tmp_path / "b", "u", lines, coding=how),
            write_blob(tmp_path / "c", "u", lines, masks={"w": mask}, coding=how),
        }
        assert len(refs) == 1
        with open_blob(tmp_path / "b", outline=outline) as blob:
            assert blob.values("w").shape == (mask.sum(),)
            np.testing.assert_allclose(blob.values("w"), lines["w"], atol=3)
    for odd in ({**lines, "w": lines["w"][1:]}, {"w": lines["w"]}, {**lines, "w": lines["w"].astype(np.float64)}):
        with pytest.raises(DigestMismatch):
            write_blob(tmp_path / "d", "u", odd, coding=Coding(outline=outline))
    with pytest.raises(Malformed, match="expected bool"):
        write_blob(tmp_path / "d", "u", {"w": lines["w"][1:]}, masks={"w": mask})


def test_what_must_be_exact_is_written_in_its_own_type(tmp_path):
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    how = Coding(form="int8", exact=frozenset({"z/w"}))
    write_blob(tmp_path / "x", "update", {"w": values, "z/w": values}, coding=how)
    with open_blob(tmp_path / "x") as blob:
        assert [blob.entry(name).form for name in ("w", "z/w")] == ["int8", ""]
        assert blob.tensor("z/w").tobytes() == values.tobytes()
