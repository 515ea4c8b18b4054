import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.data.decode import BadSample, decode, inspect, to_uint8

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """Smooth colours, red above and blue below."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image


def colour(pixels: torch.Tensor, row: float, column: float) -> list[int]:
    """The pixel at a place given in fractions of height and width."""
    _, height, width = pixels.shape
    return pixels[:, int(row * height), int(column * width)].tolist()


def near(got: list[int], wanted: tuple[int, ...], slack: int = 6) -> bool:
    return all(abs(a - b) <= slack for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_gives_rgb_or_grey(kind, mode):
    image = picture().convert(mode)
    settings = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = saved(image, kind, **settings)
    rgb, grey = decode(data), decode(data, in_chans=1)
    assert rgb.dtype == grey.dtype == torch.uint8
    assert (rgb.shape, grey.shape) == ((3, 40, 60), (1, 40, 60))
    assert near(colour(rgb, 0.2, 0.5), RED if mode == "RGB" else (76, 76, 76))
    assert near(colour(grey, 0.2, 0.5), (76,))
    assert inspect(data)[2:] == inspect(data, full=False)[2:] == (40, 60)


def test_the_fast_jpeg_path_equals_pillow_closely_and_does_not_copy():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 15, 3), dtype=np.uint8)).resize((61, 43))
    data = saved(image, "JPEG", quality=90, subsampling=0)
    pixels = decode(data)
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert (pixels.int() - reference.int()).abs().max() <= 2
    assert pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, in_chans, orientation):
    """B36: red is where a viewer shows it."""
    corner = Image.new("RGB", (60, 40), BLUE)
    corner.paste(RED, (0, 0, 30, 20))  # top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(corner, kind, exif=exif, quality=95), in_chans)
    assert pixels.shape[1:] == ((40, 60) if orientation < 5 else (60, 40))
    shown = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    found = [
        (row, column)
        for row in (0, 1)
        for column in (0, 1)
        if near(colour(pixels, 0.25 + row / 2, 0.25 + column / 2), RED if in_chans == 3 else (76,), 20)
    ]
    assert found == [shown]


@pytest.mark.parametrize(
    "junk", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9, b"zz" * 40]
)
def test_broken_exif_does_not_raise(junk):
    """B36, second half."""
    data = saved(picture(), "JPEG", quality=95, exif=b"Exif\0\0" + junk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data).shape == (3, 40, 60)


@pytest.mark.parametrize(("mode", "background"), [("RGBA", (255, 255, 255)), ("LA", (10, 20, 30)), ("P", (0, 255, 0))])
def test_transparency_is_composited_quietly(mode, background, recwarn):
    """B34."""
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    image.paste((9, 9, 9, 0), (10, 0, 20, 20))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        alphas = bytes(255 if red > 128 else 0 for red in (image.getpalette() or [])[::3])
        data = saved(image, "PNG", transparency=alphas)
    else:
        data = saved(image.convert(mode), "PNG")
    pixels = decode(data, background=background)
    assert near(colour(pixels, 0.5, 0.75), background, 1)
    assert not near(colour(pixels, 0.5, 0.25), background, 1)
    grey = Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0))
    assert colour(decode(data, 1, background), 0.5, 0.75) == [grey]
    assert not recwarn.list


def test_transparency_colour_key_of_rgb_png():
    data = saved(picture(), "PNG", transparency=RED)
    assert colour(decode(data), 0.2, 0.5) == [255, 255, 255]
    assert colour(decode(data), 0.8, 0.5) == list(BLUE)


def test_palette_one_bit_and_cmyk():
    """Includes Adobe's inverted CMYK, which Pillow's JPEG writer uses."""
    assert colour(decode(saved(picture().quantize(8), "PNG")), 0.2, 0.5) == list(RED)
    bits = decode(saved(picture().convert("1", dither=Image.Dither.NONE), "PNG"), 1)
    assert set(bits.unique().tolist()) <= {0, 255}
    for kind in ("JPEG", "TIFF"):
        data = saved(picture().convert("CMYK"), kind)
        assert inspect(data).mode == "CMYK"
        assert near(colour(decode(data), 0.2, 0.5), RED)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "npy"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(order, kind, in_chans):
    """B32."""
    ramp = (np.arange(4096).reshape(64, 64) * 16).astype(f"{order}u2")
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombuffer("I;16", (64, 64), ramp.astype("<u2").tobytes(), "raw", "I;16", 0, 1)
    if order == ">":
        image = Image.frombuffer(mode, (64, 64), ramp.tobytes(), "raw", mode, 0, 1)
    data = npy(ramp) if kind == "npy" else saved(image, kind)
    pixels = decode(data, in_chans)
    assert pixels.shape == (in_chans, 64, 64)
    assert len(pixels.unique()) > 200
    np.testing.assert_array_equal(pixels[0].numpy(), np.rint(ramp.astype(float) / 257))


def test_rules_of_scaling():
    assert to_uint8(np.array([0.0, 0.5, 1.0], np.float32)).tolist() == [0, 128, 255]
    assert to_uint8(np.array([-1.0, 0.0, 3.0])).tolist() == [0, 64, 255]
    assert to_uint8(np.array([7.0, 7.0])).tolist() == [0, 0]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]
    assert to_uint8(np.array([0, 65535], np.int32)).tolist() == [0, 255]
    assert to_uint8(np.array([-(2**31), 2**31 - 1], np.int32)).tolist() == [0, 255]
    assert to_uint8(np.array([1, 2, 255], np.uint8)).tolist() == [1, 2, 255]
    with pytest.raises(BadSample, match="finite"):
        to_uint8(np.array([0.0, np.nan]))
    assert (
        len(decode(saved(Image.fromarray(np.linspace(-5, 5, 400, dtype=np.float32).reshape(20, 20)), "TIFF")).unique())
        > 200
    )


def test_any_number_of_channels():
    array = np.random.default_rng(0).integers(0, 255, (6, 9, 5), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(decode(npy(array), 5), expected)
    assert torch.equal(decode(npy(array.transpose(2, 0, 1)), 5), expected)
    four = array[:, :, :4].copy()
    assert torch.equal(decode(saved(Image.fromarray(four, "RGBA"), "TIFF"), 4), torch.from_numpy(four).permute(2, 0, 1))
    assert torch.equal(decode(npy(array[:, :, 0]), 3), expected[:1].expand(3, -1, -1))
    with pytest.raises(BadSample, match="has 5 channels, but in_chans=3"):
        decode(npy(array))
    with pytest.raises(BadSample, match="has 3 channels, but in_chans=4"):
        decode(saved(picture(), "JPEG"), 4)


def test_arrays_never_run_code():
    file = io.BytesIO()
    np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(BadSample, match="object"):
        decode(file.getvalue())


def test_tiff_of_many_bands():
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).integers(0, 2**16, (8, 12, 6), dtype=np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(decode(file.getvalue(), 6).permute(1, 2, 0).numpy(), np.rint(array / 257.0))


BROKEN = {
    "empty": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><html></html>", "begins with b'<!DOCTYPE"),
    "text": (b"404 Not Found", "begins with b'404 Not Found"),
    "zeros": (bytes(100_000), "begins with"),
    "cut jpeg": (saved(picture(), "JPEG")[:400], ""),
    "half jpeg": (saved(picture(400, 600), "JPEG")[:2000], "truncated"),
    "cut png": (saved(picture(), "PNG")[:60], ""),
    "cut webp": (saved(picture(), "WEBP")[:60], ""),
    "cut tiff": (saved(picture(), "TIFF")[:500], ""),
    "cut gif": (saved(picture(), "GIF")[:100], ""),
    "cut npy": (npy(np.zeros((9, 9)))[:200], ""),
    "magic only": (b"\xff\xd8\xff", ""),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_what_is_no_image_is_a_bad_sample(case, in_chans):
    """B38, B40: one kind of exception, with the reason and without addresses of objects."""
    data, reason = BROKEN[case]
    reason = reason or "."
    with pytest.raises(BadSample, match=reason) as caught:
        decode(data, in_chans)
    assert "0x7" not in str(caught.value)
    with pytest.raises(BadSample, match=reason):
        inspect(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "npy"])
def test_the_pixel_limit_is_ours(kind, recwarn):
    """B41: also above and below Pillow's own limits, without its warnings."""
    image = Image.new("L", (12_000, 8_000))
    data = npy(np.asarray(image)) if kind == "npy" else saved(image, kind)
    with pytest.raises(BadSample, match="max_pixels=1000000"):
        decode(data, 1, max_pixels=1_000_000)
    with pytest.raises(BadSample, match="max_pixels"):
        inspect(data, full=False, max_pixels=1_000_000)
    limit = Image.MAX_IMAGE_PIXELS
    assert inspect(data, full=False).width == 12_000 or kind == "npy"
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


def test_threads_leave_pillow_as_it_was():
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = saved(picture(), "PNG")
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)
