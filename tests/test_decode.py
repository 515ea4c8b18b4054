import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from ssl_vit.data.arrays import to_uint8
from ssl_vit.data.decode import BadSample, decode, inspect
from ssl_vit.data.views import CentreView, CropView

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, photometric: str = "minisblack", **settings) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric=photometric, **settings)
    return file.getvalue()


def deep_png(array: np.ndarray, colour_key: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG of values (H, W, C), which Pillow only writes in grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    key = chunk(b"tRNS", struct.pack(f">{len(colour_key)}H", *colour_key)) if colour_key else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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


def test_only_the_exif_segment_turns_an_image():
    """B36: wherever it stands among the others."""
    quarter = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    assert decode(saved(picture(), "JPEG", comment=quarter)).shape == (3, 40, 60)
    data, comment = saved(picture(), "JPEG", exif=quarter), b"\xff\xfe" + struct.pack(">H", 60_000) + bytes(59_998)
    assert decode(data).shape == decode(data[:2] + 2 * comment + data[2:]).shape == (3, 60, 40)


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


def test_palette_of_mixed_alpha_is_blended_quietly(recwarn):
    """B34: an alpha for each entry of the palette, as bytes."""
    alphas = (0, 51, 128, 204, 255)
    image = Image.frombytes("P", (5, 1), bytes(range(5)))
    image.putpalette([200, 100, 0] * 5)
    data = saved(image, "PNG", transparency=bytes(alphas))
    blended = [[round(c * a / 255 + 255 * (1 - a / 255)) for c in (200, 100, 0)] for a in alphas]
    np.testing.assert_allclose(decode(data)[:, 0].T.numpy(), blended, atol=1)
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


def ycck(colour: tuple[int, int, int]) -> bytes:
    """A JPEG as Photoshop writes it: inverted CMYK turned into YCC and K. Pillow inverts what it writes, too."""
    luma = Image.new("RGB", (1, 1), tuple(255 - value for value in colour)).convert("YCbCr").getpixel((0, 0))
    planes = [Image.new("L", (16, 16), 255 - value) for value in (*luma, 255)]
    data = bytearray(saved(Image.merge("CMYK", planes), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2  # the transform: YCCK
    return bytes(data)


@pytest.mark.parametrize("wanted", [RED, BLUE, (255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_jpegs_of_every_colour_space(wanted):
    image = Image.new("RGB", (16, 16), wanted)
    cmyk = saved(image.convert("CMYK"), "JPEG", quality=100)
    marker = cmyk.index(b"Adobe") - 4
    files = {
        "YCbCr": saved(image, "JPEG", quality=100),
        "RGB": saved(image, "JPEG", quality=100, keep_rgb=True),
        "progressive": saved(image, "JPEG", quality=100, progressive=True),
        "CMYK": cmyk,
        "CMYK without Adobe's marker": cmyk[:marker] + cmyk[marker + 16 :],
        "YCCK": ycck(wanted),
    }
    grey = image.convert("L").getpixel((0, 0))
    for name, data in files.items():
        assert near(colour(decode(data), 0.5, 0.5), wanted, 3), name
        assert near(colour(decode(data, 1), 0.5, 0.5), (grey,), 3), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_colour_profiles_change_nothing(kind):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = saved(picture(), kind, icc_profile=profile)
    assert len(data) > len(plain := saved(picture(), kind))
    assert torch.equal(decode(data), decode(plain))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_counts(kind):
    frames = [picture(), Image.new("RGB", (60, 40), (0, 255, 0))]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
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


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colour_counts_by_its_upper_byte(channels):
    """B32, B34: within a level of the full range, alpha composited."""
    ramp = np.arange(4096).reshape(64, 64) * 16
    alpha = np.repeat([0, 65535], 32)[:, None].repeat(64, axis=1)
    layers = {2: [ramp, alpha], 3: [ramp, ramp, ramp], 4: [ramp, ramp, ramp, alpha]}[channels]
    pixels = decode(deep_png(np.stack(layers, 2)), background=(10, 20, 30)).numpy()
    np.testing.assert_allclose(pixels[0], ramp / 257 if channels == 3 else np.where(alpha, ramp / 257, 10), atol=1)


def test_colour_key_of_sixteen_bit_grey():
    pixels = decode(deep_png(np.array([[[1000], [65535]]]), colour_key=(1000,)), background=(10, 20, 30))
    assert pixels[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


RAMP = np.arange(4096).reshape(64, 64)
FULL = np.rint(RAMP * (255 / 4095))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff((RAMP * 16 + 15).astype("<u2"), "miniswhite"), 255 - np.rint((RAMP * 16 + 15) / 257)),
        (tiff((RAMP // 16).astype(np.uint8), "miniswhite"), 255 - RAMP // 16),
        (tiff((RAMP / 4095).astype("<f4"), "miniswhite"), 255 - FULL),
        (tiff((RAMP * 1048832).astype("<u4")), FULL),
        (tiff((RAMP - 2000).astype("<i2")), FULL),
        (tiff((RAMP - 2000).astype(">i4"), byteorder=">"), FULL),
        (tiff((RAMP // 16 - 128).astype(np.int8)), RAMP // 16),
        (tiff((RAMP / 4095).astype("<f4")), FULL),
        (tiff((RAMP / 100 - 3).astype("<f8")), FULL),
        (tiff((RAMP > 9).astype(bool)), (RAMP > 9) * 255),
        (tiff(np.stack([RAMP * 16] * 3).astype("<u2"), "rgb", planarconfig="separate"), np.rint(RAMP * 16 / 257)),
        (tiff(np.stack([RAMP / 4095] * 3, 2).astype("<f4"), "rgb"), FULL),
        (b"P5 64 64 65535\n" + (RAMP // 16).astype(">u2").tobytes(), np.rint(RAMP // 16 / 257)),
        (b"P5 64 64 4095\n" + RAMP.astype(">u2").tobytes(), FULL),
        (npy((RAMP // 16).astype(np.int64)), RAMP // 16),
        (npy((RAMP // 16).astype(">u2")), np.rint(RAMP // 16 / 257)),
    ],
    ids=["white-is-0 u16", "white-is-0 u8", "white-is-0 f32", "u32", "i16", "i32", "i8", "f32", "f64", "1 bit",
         "planes of u16", "f32 RGB", "dark 16-bit pgm", "12-bit pgm", "int64 of bytes", "dark u2"],
)  # fmt: skip
def test_every_depth_has_its_right_value(data, expected):
    """B32: not clipped, not wrapped, not inverted."""
    for in_chans in (1, 3):
        np.testing.assert_array_equal(decode(data, in_chans)[0].numpy(), expected)


def test_twelve_bit_tiff():
    packed = tiff(np.arange(64 * 48, dtype="<u2").reshape(64, 48), metadata=None)
    for tag, old, new in ((258, 16, 12), (256, 48, 64)):  # 48 values of 16 bits are 64 of 12
        entry = next(struct.pack("<HHII", tag, kind, 1, old) for kind in (3, 4)
                     if struct.pack("<HHII", tag, kind, 1, old) in packed)  # fmt: skip
        packed = packed.replace(entry, entry[:8] + struct.pack("<I", new))
    raw = np.arange(64 * 48, dtype="<u2").view(np.uint8).reshape(-1, 3).astype(int)
    values = np.stack([raw[:, 0] << 4 | raw[:, 1] >> 4, (raw[:, 1] & 15) << 8 | raw[:, 2]], 1).reshape(64, 64)
    np.testing.assert_allclose(decode(packed, 1)[0].numpy(), values * (255 / 4095), atol=0.51)


def test_rules_of_scaling():
    assert to_uint8(np.array([0.0, 0.5, 1.0], np.float32)).tolist() == [0, 128, 255]
    assert to_uint8(np.array([-1.0, 0.0, 3.0])).tolist() == [0, 64, 255]
    assert to_uint8(np.array([7.0, 7.0])).tolist() == [0, 0]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]
    assert to_uint8(np.array([0, 65535], np.int32)).tolist() == [0, 255]
    assert to_uint8(np.array([0, 7, 255], np.int32)).tolist() == [0, 7, 255]
    assert to_uint8(np.array([0, 255, 257], np.uint16)).tolist() == [0, 1, 1]
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
    array = np.random.default_rng(0).integers(0, 2**16, (8, 12, 6), dtype=np.uint16)
    expected = np.rint(array / 257.0)
    in_one_page = tiff(array, planarconfig="contig")
    a_page_each = tiff(array.transpose(2, 0, 1).copy())
    turned = tiff(array, planarconfig="contig", extratags=[(0x0112, 3, 1, 6, True)])
    np.testing.assert_array_equal(decode(in_one_page, 6).permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(decode(a_page_each, 6).permute(1, 2, 0).numpy(), expected)
    np.testing.assert_array_equal(decode(turned, 6).permute(1, 2, 0).numpy(), np.rot90(expected, -1))
    assert decode(a_page_each).shape == (3, 8, 12), "of several pages the first is the image"
    with pytest.raises(BadSample, match="max_pixels"):
        decode(a_page_each, 6, max_pixels=90)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_no_band_of_a_tiff_is_lost(channels):
    """Pillow opens grey or RGB with extra bands, and drops them."""
    array = np.random.default_rng(0).integers(0, 256, (8, 12, channels), dtype=np.uint8)
    colours = 1 if channels == 2 else 3
    data = tiff(array, "rgb" if colours == 3 else "minisblack", planarconfig="contig",
                extrasamples=(0,) * (channels - colours))  # fmt: skip
    np.testing.assert_array_equal(decode(data, channels).permute(1, 2, 0).numpy(), array)
    np.testing.assert_array_equal(decode(data)[:colours].permute(1, 2, 0).numpy(), array[:, :, :colours])


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
    "12-bit jpeg": (saved(picture(), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "no readable jpg"),
    "html named as an archive": (b"\r\n<html><head><title>503", "begins with b'"),
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


def odd_images() -> Iterator[tuple[str, bytes, int]]:
    """Names, files and the channels that all of a file becomes, good ones and bad ones."""
    for name, (data, _) in BROKEN.items():
        yield name, data, 3
    for kind, modes in {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGBA", "LA", "P", "1", "I;16"], "TIFF": ["RGB", "F"],
                        "WEBP": ["RGBA"], "GIF": ["P"], "BMP": ["1"], "PPM": ["L"]}.items():  # fmt: skip
        for mode in modes:
            data = saved(picture().convert("L" if mode == "I;16" else "RGB").convert(mode), kind)
            for length in (len(data), len(data) - 9, len(data) // 2, 40):
                yield f"{kind} {mode}, {length} bytes", data[:length], 3
    values = np.random.default_rng(0).integers(0, 255, (6, 12, 9))
    for depth in ("u1", "i1", "u2", "f4"):
        for channels in range(2, 7):
            array, name = values[:channels].astype(depth), f"{channels} x {depth}"
            yield f"npy {name}", npy(array), channels
            yield f"pages {name}", tiff(array), channels
            for planes in ("separate", "contig"):
                for colours, photometric in ((1, "minisblack"), (3, "rgb")):
                    if channels > colours:
                        settings = {"planarconfig": planes, "extrasamples": (0,) * (channels - colours)}
                        bands = array if planes == "separate" else array.transpose(1, 2, 0).copy()
                        for compression in (None, "zlib"):
                            data = tiff(bands, photometric, compression=compression, **settings)
                            yield f"tiff {name} {planes} {photometric} {compression}", data, channels
                            yield f"cut tiff {name} {planes} {photometric} {compression}", data[:-40], channels
    grey = [picture().convert("L")] * 4
    yield "LZW pages", saved(grey[0], "TIFF", save_all=True, append_images=grey[1:], compression="tiff_lzw"), 4
    yield "not finite", npy(np.full((8, 9, 5), np.nan)), 5
    yield "not finite pages", tiff(np.full((5, 8, 9), np.inf, "f4")), 5


def refuses(look: Callable, *words) -> bool:
    try:
        look(*words)
    except BadSample:
        return True
    return False


def test_what_training_would_not_decode_is_not_inspected_as_good():
    outcomes = {
        name: (refuses(decode, data, in_chans), refuses(inspect, data)) for name, data, in_chans in odd_images()
    }
    assert {name: refused for name, refused in outcomes.items() if refused[0] != refused[1]} == {}
    assert 40 < sum(refused for refused, _ in outcomes.values()) < len(outcomes) - 100


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (tiff(np.zeros((8, 12, 5), np.uint8), "rgb", planarconfig="contig", extrasamples=(0, 0)), "5xuint8"),
        (tiff(np.zeros((5, 8, 12), np.uint8), planarconfig="separate", compression="zlib"), "5xuint8"),
        (tiff(np.zeros((3, 8, 12), np.uint16), planarconfig="separate"), "3xuint16"),
        (tiff(np.zeros((4, 8, 12), np.uint8)), "4 pages of L"),
        (tiff(np.zeros((2, 8, 12, 3), np.uint8), "rgb"), "2 pages of RGB"),
        (npy(np.zeros((5, 8, 12), np.uint16)), "5xuint16"),
        (npy(np.zeros((8, 12, 5), np.uint16)), "5xuint16"),
        (saved(Image.new("RGBA", (12, 8)), "TIFF"), "RGBA"),
    ],
)
def test_modes_say_all_that_a_file_holds(data, mode):
    """Pillow opens the first ones as RGB and L."""
    assert inspect(data)[1:] == inspect(data, full=False)[1:] == (mode, 8, 12)


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_cut_anywhere_is_refused(settings):
    """B38: no grey half ever becomes a picture."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize((97, 71)), "JPEG", **settings)
    assert decode(data + b"\0" * 9).shape == (3, 71, 97), "what follows the picture does no harm"
    for cut in [*range(0, len(data), len(data) // 60), len(data) - 2, len(data) - 1]:
        with pytest.raises(BadSample):
            decode(data[:cut])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_what_is_cut_is_refused_or_whole(kind, capfd):
    data = saved(picture(), kind)
    whole = decode(data)
    for cut in range(0, len(data), max(1, len(data) // 60)):
        with suppress(BadSample):
            assert torch.equal(decode(data[:cut]), whole)
    assert capfd.readouterr() == ("", ""), "no library writes of its own"


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


def test_very_large_small_and_long_images():
    """B41: 400 megapixels are refused by their header; a strip and a single pixel become views."""
    data = bytearray(saved(picture(), "PNG"))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(BadSample, match="has 20000 x 20000 pixels, more than max_pixels=178956970"):
        decode(bytes(data))
    random_crop = CropView((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, "bicubic")
    centre_crop = CentreView((32, 32), 0.875, "bicubic")
    for size in ((30_000, 40), (40, 30_000), (1, 1), (1, 30_000)):
        sample = {"image": decode(saved(Image.new("RGB", size, RED), "PNG")), "label": -1}
        for view in (random_crop(sample), centre_crop(sample)):
            assert view["image"].shape == (3, 32, 32)
            assert near(colour(view["image"], 0.5, 0.5), RED, 0)


def test_threads_leave_pillow_as_it_was():
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    data = saved(picture(), "PNG")
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)
