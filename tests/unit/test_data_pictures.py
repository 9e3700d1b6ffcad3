"""Pictures as cameras, scanners and other programs leave them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from edge_runtime.data.images import picture

STEPS = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)


def png(path):
    Image.fromarray(STEPS).save(path)


def pgm(path):
    path.write_bytes(b"P5 4 4 65535\n" + STEPS.astype(">u2").tobytes())


@pytest.mark.parametrize(("write", "name"), [(png, "a.png"), (pgm, "a.pgm")])
def test_grey_of_sixteen_bits_keeps_its_steps(tmp_path, write, name):
    write(tmp_path / name)
    assert picture(tmp_path / name).tolist() == [(STEPS >> 8).tolist()]
    assert picture(tmp_path / name, (3, 4, 4))[2].tolist() == (STEPS >> 8).tolist()


def test_a_palette_with_several_degrees_of_transparency_is_a_picture(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = np.arange(8) * 30, np.arange(8)[:, None] * 36
    Image.fromarray(pixels).quantize(16).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "P"
        assert isinstance(opened.info["transparency"], bytes)
        wanted = np.asarray(opened.convert("RGBA"))[..., :3]
    assert np.array_equal(picture(tmp_path / "a.png"), wanted.transpose(2, 0, 1))


def test_a_photograph_with_a_broken_exif_block_is_a_picture(tmp_path):
    made = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    Image.new("RGB", (6, 4), (9, 9, 9)).save(made, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(made.getvalue())
    assert picture(tmp_path / "a.jpg").shape == (3, 4, 6)
