"Images written byte by byte: TIFFs of any depth and with any tags, PNGs of any depth."

import struct
import zlib

import numpy as np

from tocsr.core.decoding import png_chunk

H = 11
W = 14
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6


def samples(channels: int, bits: int = 16, seed: int = 0) -> np.ndarray:
    "Random samples (H, W, channels)."
    return np.random.default_rng(seed).integers(0, 2**bits, (H, W, channels), dtype=np.uint32)


def pack_bits(values: np.ndarray, bits: int, order: str) -> bytes:
    "Rows of samples (h, w, c) as a TIFF stores them: rows begin at bytes, high bits first."
    if bits in (16, 32):
        return values.astype(f"{order}u{bits // 8}").tobytes()
    flat = values.reshape(len(values), -1)
    one_by_one = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(one_by_one.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def lzw(data: bytes) -> bytes:
    "LZW of literals alone: the table is cleared before its codes need more than nine bits."
    codes = []
    for start in range(0, len(data), 250):
        codes += [256, *data[start : start + 250]]
    codes.append(257)
    text = "".join(f"{c:09b}" for c in codes)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def reverse_bits(data: bytes) -> bytes:
    return np.packbits(
        np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, 1), axis=1)[:, ::-1]
    ).tobytes()


def write_tiff(
    a: np.ndarray, bits: int, photometric: int, *, order="<", planar=1, pack=bytes, **more
):
    "Samples (h, w, c) as a TIFF; `more`: tags as t259=5."
    h, w, c = a.shape
    planes = [a] if planar == 1 else [a[..., i : i + 1] for i in range(c)]
    strips = [pack(pack_bits(p, bits, order)) for p in planes]
    tags = {256: w, 257: h, 258: (bits,) * c, 259: 1, 262: photometric, 277: c, 278: h, 284: planar}
    tags |= {int(k[1:]): v for k, v in more.items()}
    tags = {k: v if isinstance(v, tuple) else (v,) for k, v in tags.items() if v is not None}
    tags |= {273: tuple(0 for _ in strips), 279: tuple(len(s) for s in strips)}
    place = 8 + 2 + 12 * len(tags) + 4
    body = b""
    for tag, values in list(tags.items()):
        if tag in (273, 279) or 2 * len(values) > 4:
            body += b"\0" * (4 * len(values))
    first = place + len(body)
    starts = [first + sum(len(s) for s in strips[:i]) for i in range(len(strips))]
    tags[273] = tuple(starts)
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HLH", 42, 8, len(tags))
    extra = b""
    for tag, values in sorted(tags.items()):
        code, size, letter = (4, 4, "L") if tag in (273, 279) else (3, 2, "H")
        data = struct.pack(f"{order}{len(values)}{letter}", *values)
        out += struct.pack(order + "HHL", tag, code, len(values))
        if len(data) <= 4:
            out += data.ljust(4, b"\0")
        else:
            out += struct.pack(order + "L", place + len(extra))
            extra += data.ljust(4 * len(values), b"\0")
    out += struct.pack(order + "L", 0) + extra.ljust(len(body), b"\0")
    return out + b"".join(strips)


def write_png(a: np.ndarray, bits: int, color: int, chunks=()):
    "Samples (h, w, c) as a PNG, with filter 0."
    h, w, _ = a.shape
    rows = pack_bits(a, bits, ">")
    step = len(rows) // h
    raw = b"".join(b"\0" + rows[i * step : (i + 1) * step] for i in range(h))
    parts = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, color, 0, 0, 0))]
    parts += [png_chunk(*c) for c in chunks]
    parts += [png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
