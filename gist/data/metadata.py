"""Image files without their metadata: the rest may be whole where the metadata are damaged."""

from __future__ import annotations

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
# What decodes a TIFF's pixels, and its orientation. Every other tag only describes the image.
_TIFF_TAGS = {
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323,
    324, 325, 330, 332, 338, 339, 347, 529, 530, 531, 532,
}  # fmt: skip


def without_metadata(data: bytes) -> bytes | None:
    """A JPEG, PNG or TIFF file without the parts that decoding does not need; None for others.

    Kept are the pixels, palette, transparency and colour transform. A TIFF keeps its orientation.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(_PNG):
            return _png(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data, "<" if data[:2] == b"II" else ">")
    except (struct.error, IndexError):  # the file ends within what it starts with
        return None
    return None


def _jpeg(data: bytes) -> bytes:
    """Without comments and application segments, other than Adobe's, which names the colours."""
    kept, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1 : at + 2] != b"\xda":  # the scan's start
        if at + 4 > len(data):
            break
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        adobe = marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14
        if adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        at += 2 + length
        if at >= len(data):
            break
    return b"".join(kept) + data[at:]


def _png(data: bytes) -> bytes:
    """Only the critical chunks, with their checksums, and a transparency that fits."""
    kept, at, colour = [_PNG], len(_PNG), data[25]
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if kind == b"tRNS":
            whole = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(
                chunk[-4:], "big"
            )
            if whole and length >= {0: 2, 2: 6}.get(colour, 1):
                kept.append(chunk)
        elif kind[:1].isupper() and kind != b"IEND":
            kept.append(chunk)
        at += 12 + length
    return b"".join(kept) + b"\0\0\0\0IEND\xae\x42\x60\x82"


def _tiff(data: bytes, order: str) -> bytes:
    """The first image's directory written anew at the end, with only the tags of the pixels."""
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    entries = [data[directory + 2 + 12 * i : directory + 14 + 12 * i] for i in range(count)]
    kept = [e for e in entries if len(e) == 12 and _fits(e, order)]
    padding = b"\0" * (len(data) % 2)  # a directory starts at an even offset
    return b"".join(
        (
            data[:4],
            struct.pack(order + "I", len(data) + len(padding)),
            data[8:],
            padding,
            struct.pack(order + "H", len(kept)),
            *kept,
            b"\0\0\0\0",
        )
    )


def _fits(entry: bytes, order: str) -> bool:
    """Whether an entry belongs to the pixels. A damaged orientation does not."""
    tag, kind, count, value = struct.unpack(order + "HHIH", entry[:10])
    if tag == 274:
        return kind == 3 and count == 1 and 1 <= value <= 8
    return tag in _TIFF_TAGS
