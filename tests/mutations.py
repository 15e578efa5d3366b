"""Pairs in a tar, and ways to damage them: each takes what it damages and a random generator, and gives the result."""

import functools
import io
import json
import struct
import tarfile
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from tars import add

SIDE = 24


class File(NamedTuple):
    """A member of a tar; `header` overrides fields of its `TarInfo`."""

    extension: str
    content: bytes
    header: dict = {}


def pixels(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def images():
    """Name -> extension and content, one of each kind of image that web data holds."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    second = [Image.fromarray(pixels(1))]
    sixteen = io.BytesIO()
    Image.fromarray(pixels().astype(np.uint16)[..., 0] * 257).save(sixteen, "PNG")
    return {
        "jpeg": ("jpg", encoded("JPEG", exif=exif, icc_profile=bytes(200))),
        "progressive": ("jpg", encoded("JPEG", progressive=True)),
        "grey jpeg": ("jpeg", encoded("JPEG", "L")),
        "cmyk": ("jpg", encoded("JPEG", "CMYK")),
        "png": ("png", encoded("PNG", exif=exif, icc_profile=bytes(200))),
        "palette": ("png", encoded("PNG", "P", transparency=b"\x00\x80\xff")),
        "alpha": ("png", encoded("PNG", "RGBA")),
        "16 bit": ("png", sixteen.getvalue()),
        "gif": ("gif", encoded("GIF", save_all=True, append_images=second)),
        "webp": ("webp", encoded("WEBP")),
        "lossless webp": ("webp", encoded("WEBP", lossless=True, exif=exif)),
        "animated webp": ("webp", encoded("WEBP", save_all=True, append_images=second)),
        "tiff": ("tif", encoded("TIFF")),
        "lzw tiff": ("tiff", encoded("TIFF", compression="tiff_lzw")),
        "bmp": ("bmp", encoded("BMP")),
        "avif": ("jpg", encoded("AVIF")),
    }


def sample(kind, caption):
    extension, content = images()[kind]
    about = json.dumps({"caption": caption, "uid": f"{0:032x}", "width": SIDE})
    return [File(extension, content), File("txt", caption.encode()), File("json", about.encode())]


def write_tar(samples):
    """Returns a tar of samples: (key, files) in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, files in samples:
            for file in files:
                add(tar, f"{key}.{file.extension}", file.content, **file.header)
    return buffer.getvalue()


# Of bytes


def flip_bits(content, rng):
    changed = np.frombuffer(content, np.uint8).copy()
    if len(changed):
        changed[rng.integers(len(changed), size=rng.integers(1, 9))] ^= np.uint8(1 << rng.integers(8))
    return changed.tobytes()


def damage_start(content, rng):
    return flip_bits(content[:64], rng) + content[64:]


def truncate(content, rng):
    return content[: rng.integers(len(content) + 1)]


def splice(content, rng):
    """Puts a part of another image, or of itself, in or in place of a part."""
    other = list(images().values())[rng.integers(len(images()))][1] if rng.random() < 0.5 else content
    begin, end = _range(other, rng)
    at, until = _range(content, rng)
    return content[:at] + other[begin:end] + content[until if rng.random() < 0.5 else at :]


def overwrite(content, rng):
    begin, end = _range(content, rng)
    return content[:begin] + bytes(rng.integers(0, 256, end - begin, np.uint8)) + content[end:]


def blank(content, rng):
    begin, end = _range(content, rng)
    return content[:begin] + bytes([rng.choice([0, 255])]) * (end - begin) + content[end:]


def extreme_number(content, rng):
    """Writes 0, the largest, or a huge number of 2 or 4 bytes anywhere in the first half: sizes, counts, offsets."""
    at = int(rng.integers(max(len(content) // 2, 1)))
    size = int(rng.choice([2, 4]))
    number = int(rng.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])) & (256**size - 1)
    return content[:at] + number.to_bytes(size, "little" if rng.random() < 0.5 else "big") + content[at + size :]


def _range(content, rng):
    begin, end = sorted(int(place) for place in rng.integers(len(content) + 1, size=2))
    return begin, min(end, begin + 400)


# Of formats


def edit_jpeg(content, rng):
    """Changes a marker, its length or its place; repeats a segment, up to thousands of times."""
    places = [at for at in range(len(content) - 3) if content[at] == 0xFF and content[at + 1] not in (0, 0xFF)]
    if not places:
        return content
    at = int(rng.choice(places))
    length = int.from_bytes(content[at + 2 : at + 4], "big") + 2
    segment = content[at : at + length]
    match int(rng.integers(5)):
        case 0:
            return content[: at + 1] + bytes([rng.integers(0xC0, 0xFF)]) + content[at + 2 :]
        case 1:
            return content[: at + 2] + struct.pack(">H", rng.integers(0x10000)) + content[at + 4 :]
        case 2:
            return content[:at] + content[at + length :]
        case 3:
            return content[:at] + segment * int(rng.choice([2, 50, 2_000])) + content[at + length :]
        case _:
            to = int(rng.choice(places))
            return content[:to] + segment + content[to:]


def resize_header(content, rng):
    """Lets the header promise another size: nothing, a strip, or gigapixels."""
    sizes = [0, 1, 3, SIDE + 1, 5_000, 8_192, 16_384, 65_535, 2**31 - 1]
    width, height = (int(rng.choice(sizes)) for _ in range(2))
    if content.startswith(b"\x89PNG"):
        header = struct.pack(">II", width, height) + content[24:29]
        return content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]
    if content.startswith(b"GIF8"):
        return content[:6] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, height) + content[26:]
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        if (at := content.find(marker)) >= 0:
            return content[: at + 5] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + content[at + 9 :]
    return extreme_number(content, rng)


def edit_png(content, rng):
    """Drops, repeats, moves, lengthens or bombs a chunk; checksums are right unless they are what is wrong."""
    if not content.startswith(b"\x89PNG"):
        return edit_jpeg(content, rng)
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    place = int(rng.integers(len(chunks))) if chunks else 0
    kind, data = chunks[place] if chunks else (b"IEND", b"")
    match int(rng.integers(7)):
        case 0:
            chunks[place : place + 1] = []
        case 1:
            chunks[place:place] = [(kind, data)] * int(rng.choice([1, 100]))
        case 2:
            chunks.insert(int(rng.integers(len(chunks) + 1)), (kind, data))
        case 3:
            chunks[place : place + 1] = [(kind, flip_bits(data, rng))]
        case 4:
            chunks[place : place + 1] = [(flip_bits(kind, rng), data)]
        case 5:
            bomb = zlib.compress(bytes(1 << 24), 9)
            named = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0", b"IDAT": b"", b"eXIf": b""}
            kind = list(named)[rng.integers(len(named))]
            chunks[1:1] = [(kind, named[kind] + bomb)]
        case _:
            chunks[place : place + 1] = [(kind, data[: rng.integers(len(data) + 1)])]
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def other_format(_content, rng):
    """Other bytes under the same name: another format's, a web page, nothing."""
    others = [content for _, content in images().values()]
    others += [
        b"",
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF" * 9,
    ]
    return others[rng.integers(len(others))]


IMAGE = (
    flip_bits, damage_start, truncate, splice, overwrite, blank, extreme_number, edit_jpeg, resize_header, edit_png,
    other_format,
)  # fmt: skip

CAPTIONS = (
    b"", b" \n\t", b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80", b"a\0b", b"x" * 70_000, b"&" * 5_000, b"&amp;" * 3_000,
    b"&" + b"amp;" * 4_000, b"&" + b"#38;" * 4_000,
    "\u202e\ufeff\u0301".encode() * 500, "\U0001f468\u200d".encode() * 2_000, "Ã¢â‚¬â„¢".encode() * 1_000,
    b"\xe2\x80\xa9" * 9, b"&#xD800;&#0;&#x110000;", b"<|endoftext|><start_of_text>", ("ß" * 8_000).encode(),
    b"1" * 16_000, b"a." * 8_000, b"'s" * 8_000, "ﷺ".encode() * 5_000,
)  # fmt: skip

METADATA = (
    b"", b"null", b"[]", b"{", b'{"caption": null}', b'{"caption": 5}', b'{"caption": ["a", 3, null, ["b"]]}',
    b'{"caption": {"a": 1}}', b'{"caption": "\\ud800 lone"}', b'{"caption": NaN, "caption": Infinity}',
    b'{"caption": ' + b"9" * 5_000 + b"}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{\0}\0", b'{"caption": "\xff"}',
    b"[" + b"[]," * 2_000_000 + b"[]]", b'{"caption": "' + b"\\u0000" * 20_000 + b'"}',
)  # fmt: skip


def edit_image(files, rng):
    change = IMAGE[rng.integers(len(IMAGE))]
    return [file._replace(content=change(file.content, rng)) if i == 0 else file for i, file in enumerate(files)]


def edit_caption(files, rng):
    if rng.random() < 0.5:
        return _edited(files, "txt", flip_bits, rng)
    return _edited(files, "txt", lambda _, rng: CAPTIONS[rng.integers(len(CAPTIONS))], rng)


def edit_metadata(files, rng):
    """Also takes the .txt away, so that the caption is looked for in the JSON."""
    without = [file for file in files if file.extension != "txt"]
    if rng.random() < 0.3:
        return _edited(without, "json", flip_bits, rng)
    return _edited(without, "json", lambda _, rng: METADATA[rng.integers(len(METADATA))], rng)


def edit_members(files, rng):
    """Takes a file away, repeats one, shuffles them, or makes one a link, a device or a folder."""
    files, place = list(files), int(rng.integers(len(files))) if files else 0
    match int(rng.integers(5)):
        case 0:
            files[place : place + 1] = []
        case 1:
            files += files[place : place + 1]
        case 2:
            files = [files[i] for i in rng.permutation(len(files))]
        case 3:
            kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"V")
            kind = {"type": kinds[rng.integers(len(kinds))], "linkname": "/etc/passwd"}
            files[place : place + 1] = [file._replace(header=kind, content=b"") for file in files[place : place + 1]]
        case _:
            extensions = ("png", "JPG", "txt", "json", "cls", "", "a.b.jpg")
            to = extensions[rng.integers(len(extensions))]
            files[place : place + 1] = [file._replace(extension=to) for file in files[place : place + 1]]
    return files


def edit_pax(files, rng):
    """Gives a file extended headers: strange ones, a name of its own, another size."""
    place = int(rng.integers(len(files))) if files else 0
    records = (
        {"path": "../" * 40 + "x.jpg"}, {"path": "y" * 3_000 + ".txt"}, {"path": "\udcff\udcfe.jpg"}, {"path": ""},
        {"SCHILY.xattr.user": "z" * 9_000}, {"mtime": "nan"}, {"comment": "=" * 99}, {"size": "x"},
    )  # fmt: skip
    header = {"pax_headers": records[rng.integers(len(records))]}
    return [file._replace(header=file.header | header) if i == place else file for i, file in enumerate(files)]


SAMPLE = (edit_image, edit_image, edit_image, edit_image, edit_caption, edit_metadata, edit_members, edit_pax)


def _edited(files, extension, change, rng):
    return [file._replace(content=change(file.content, rng)) if file.extension == extension else file for file in files]


# Of tars


def cut_tar(content, rng):
    return content[: rng.integers(len(content) + 1)]


def flip_header(content, rng):
    """Changes a header, whose checksum then does not fit."""
    at = _header(content, rng)
    return content[:at] + flip_bits(content[at : at + 512], rng) + content[at + 512 :]


def forge_header(content, rng):
    """Changes a header's size or kind, and lets its checksum fit."""
    at = _header(content, rng)
    header = bytearray(content[at : at + 512])
    if len(header) < 512:
        return content
    sizes = (
        b"00000000000\0",
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"00000400000\0",
        b"-0000000001\0",
    )
    if rng.random() < 0.7:
        header[124:136] = sizes[rng.integers(len(sizes))]
    else:
        header[156] = int(rng.choice(list(b"0xLKgSV57\0\xff")))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def forge_pax(content, rng):
    """Puts extended headers of any content before a member."""
    bodies = (
        b"9" * 5_000 + b" path=a\n", b"30 size=" + b"9" * 20 + b"\n", b"4 =\n" * 200_000, b"\0" * 600, b"12 path=a.jpg",
        b"6010 size=" + b"1" * 5_999 + b"\n", b"0 path=x\n", b"-5 a=b\n", b"99999 path=x\n", b"14 size=-512\n",
        b" " * 700, b"16 size=\xd9\xa3\xd9\xa3\xd9\xa3\n",
    )  # fmt: skip
    body = bodies[rng.integers(len(bodies))]
    info = tarfile.TarInfo("pax")
    info.size, info.type = len(body), (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)[rng.integers(3)]
    at = _header(content, rng)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return content[:at] + header + body + bytes(-len(body) % 512) + content[at:]


def misalign(content, rng):
    at = _header(content, rng)
    return content[:at] + bytes(int(rng.integers(1, 700))) + content[at:]


def overwrite_blocks(content, rng):
    at = _header(content, rng)
    size = 512 * int(rng.integers(1, 20))
    filler = bytes(size) if rng.random() < 0.5 else bytes(rng.integers(0, 256, size, np.uint8))
    return content[:at] + filler + content[at + size :]


TAR = (cut_tar, flip_header, forge_header, forge_pax, misalign, overwrite_blocks)


def _header(content, rng):
    """Returns where one of the headers is."""
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    return int(rng.choice(headers)) if headers else 0
