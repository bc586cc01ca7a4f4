"""Damaged and hostile files of every kind that is read: each gives one sentence that names it, or a result.

Run by hand for a long campaign: python tests/helpers/fuzz_files.py --count 2000. It makes small files,
changes bytes in them (also within what is packed, with checksums put right), and reads them in a process that
may take one more gigabyte of memory and ten seconds a file. What goes wrong is printed with the seed that
repeats it.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

from quincunx.data import load_data
from quincunx.networks import build
from quincunx.networks.checkpoints import read_weights
from quincunx.networks.weights import load, read_npz

GIGABYTE, SECONDS = 1 << 30, 10
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 2**64 - 1]


# ---------------------------------------------------------------- small files


def picture(draw: random.Random, form: str) -> bytes:
    width, height = draw.choice([(8, 8), (20, 13), (1, 40), (33, 32)])
    pixels = np.frombuffer(draw.randbytes(3 * width * height), dtype=np.uint8).reshape(height, width, 3)
    image = Image.fromarray(pixels)
    options: dict[str, object] = {}
    if form in ("jpeg", "png", "webp") and draw.random() < 0.5:
        exif = Image.Exif()
        exif[274] = draw.randint(1, 8)
        options["exif"] = exif
    if form == "gif" or (form == "png" and draw.random() < 0.3):
        image = image.convert("P")
    if form == "tiff":
        options["compression"] = draw.choice([None, "tiff_lzw", "packbits", "tiff_deflate"])
    if form == "jpeg":
        options["progressive"] = draw.random() < 0.3
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def images_of(draw: random.Random) -> dict[str, bytes]:
    return {
        f"{part}/{name}/{i}.png": picture(draw, "png")
        for part in ("train", "test")
        for name in "ab"
        for i in range(2)
    }


def as_tar(files: dict[str, bytes], draw: random.Random) -> bytes:
    file = io.BytesIO()
    form = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in files.items():
            if form != tarfile.USTAR_FORMAT and draw.random() < 0.2:
                name = f"{'long/' * 30}{name}"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            member = tarfile.TarInfo(f"train/a/link{kind.decode()}.png")
            member.type = kind
            member.linkname = "train/b/0.png" if kind == tarfile.LNKTYPE else "../b/0.png"
            archive.addfile(member)
    return file.getvalue()


def as_zip(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def weights() -> dict[str, torch.Tensor]:
    return build("cifar-resnet8", num_classes=3, width=4).state_dict()


def checkpoint(draw: random.Random, zipped: bool) -> bytes:
    content: object = {f"module.{k}": v for k, v in weights().items()}
    content = draw.choice(
        [
            content,
            {"state_dict": content, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
            {"model": content, "best": np.float64(0.5), "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
        ]
    )
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def layers(draw: random.Random) -> dict[str, bytes]:
    found = {}
    for name, shape in (
        ("conv1/weight", (2, 3, 1, 1)),
        ("conv1/bias", (2,)),
        ("fc/kernel_hwio", (1, 1, 2, 2)),
    ):
        file = io.BytesIO()
        np.save(file, np.ones(shape, dtype=draw.choice([np.float32, np.float64, np.int8])))
        found[f"{name}.npy"] = file.getvalue()
    return found | {"fc/bias.npy": found["conv1/bias.npy"]}


def cifar_files(python: bool) -> dict[str, bytes]:
    images = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    names = [f"c{i}" for i in range(10)]
    found = {}
    for batch in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        if python:
            found[batch] = pickle.dumps(
                {"data": images, "labels": [1, 2], "filenames": ["a", "b"]}, protocol=3
            )
        else:
            found[f"{batch}.bin"] = b"".join(bytes([i]) + image.tobytes() for i, image in enumerate(images))
    if python:
        return found | {"batches.meta": pickle.dumps({"label_names": names}, protocol=3)}
    return found | {"batches.meta.txt": "\n".join(names).encode()}


# ---------------------------------------------------------------- changes


def changed(content: bytes, draw: random.Random) -> bytes:
    """Some bytes other than they were."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        if not found:
            break
        at = draw.randrange(len(found))
        # heads say more than what follows
        at = at % 64 if draw.random() < 0.3 else at
        kind = draw.randrange(8)
        if kind == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at] = draw.randrange(256)
        elif kind == 2:
            size = draw.choice([1, 2, 4, 8])
            value = draw.choice(INTERESTING) & (256**size - 1)
            found[at : at + size] = value.to_bytes(size, draw.choice(["little", "big"]))
        elif kind == 3:
            del found[at : at + draw.randrange(1, 40)]
        elif kind == 4:
            found[at:at] = draw.randbytes(draw.randrange(1, 20))
        elif kind == 5:
            start = draw.randrange(len(found))
            found[at:at] = found[start : start + draw.randrange(1, 200)]
        elif kind == 6 and draw.random() < 0.3:
            del found[at:]
        else:
            digits = [i for i, byte in enumerate(found[:4096]) if 48 <= byte <= 57]
            if digits:
                found[draw.choice(digits)] = ord(draw.choice("0123456789-"))
    return bytes(found)


def changed_png(content: bytes, draw: random.Random) -> bytes:
    """A PNG with other chunks whose checksums are right."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    place = draw.randrange(len(chunks))
    kind, body = chunks[place]
    if kind == b"IDAT":
        body = zlib.compress(changed(zlib.decompress(body), draw))
    elif kind == b"IHDR" and draw.random() < 0.5:
        width, height = (draw.choice([1, 8, 1 << 10, 1 << 14, 1 << 20, 1 << 31]) for _ in range(2))
        body = struct.pack(">II", width, height) + body[8:]
    else:
        body = changed(body, draw)
    chunks[place] = kind, body
    return content[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def changed_tar(content: bytes, draw: random.Random) -> bytes:
    """A tar archive with another header whose checksum is right."""
    found = bytearray(content)
    headers = [at for at in range(0, len(found) - 511, 512) if found[at + 257 : at + 262] == b"ustar"]
    for at in draw.sample(headers, min(len(headers), draw.choice([1, 1, 3]))):
        header = found[at : at + 512]
        kind = draw.randrange(5)
        if kind == 0:
            header[124:136] = b"\x80" + draw.choice(INTERESTING).to_bytes(11, "big")
        elif kind == 1:
            header[124:136] = b"%011o\0" % (draw.choice(INTERESTING) % 8**11)
        elif kind == 2:
            header[156] = ord(draw.choice("0123456789LKxgSX\0"))
        elif kind == 3:
            header[draw.choice([0, 157, 345, 386, 482])] = draw.randrange(256)
        else:
            header = bytearray(changed(bytes(header), draw)[:512].ljust(512, b"\0"))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % (sum(header) % 8**6)
        found[at : at + 512] = header
    return bytes(found)


def changed_member(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    name = draw.choice(sorted(files))
    return {**files, name: changed(files[name], draw)}


def repacked(content: bytes, draw: random.Random, likely: str) -> bytes:
    """A zip archive with a member changed, its checksum right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next((name for name in files if name.endswith(likely) and draw.random() < 0.8), None)
    name = name or draw.choice(sorted(files))
    files[name] = changed(files[name], draw)
    return as_zip(files, zipfile.ZIP_STORED)


def changed_head(content: bytes, draw: random.Random) -> bytes:
    """A .safetensors file with another head of right length."""
    size = int.from_bytes(content[:8], "little")
    head = changed(content[8 : 8 + size], draw)
    if draw.random() < 0.3:
        entries = json.loads(content[8 : 8 + size])
        entry = entries[draw.choice(sorted(entries))]
        entry[draw.choice(sorted(entry))] = draw.choice(
            ["F32", "XX", [2**62], [-1], [0, 2**63], [[1]], None, {}]
        )
        head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


# ---------------------------------------------------------------- kinds


def folder_with(form: str) -> Callable[[Path, random.Random], None]:
    def try_it(where: Path, draw: random.Random) -> None:
        for name, content in images_of(draw).items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(content)
        content = picture(draw, form)
        deep = form == "png" and draw.random() < 0.5
        bad = changed_png(content, draw) if deep else changed(content, draw)
        (where / "train" / "a" / f"bad{draw.choice(['', f'.{form}'])}").write_bytes(bad)
        skip = draw.random() < 0.5
        options = {"size": 16, "skip_bad": skip, "exif": draw.random() < 0.8}
        data = load_data(where, **options, stream=draw.random() < 0.2)
        assert len(data.test) == 4

    return try_it


def archive_of(pack: Callable[[bytes], bytes] | None) -> Callable[[Path, random.Random], None]:
    def try_it(where: Path, draw: random.Random) -> None:
        path = where / "images.tar"
        files = images_of(draw)
        if draw.random() < 0.1:
            files = {f"train/{name}": content for name, content in cifar_files(draw.random() < 0.5).items()}
        content = as_tar(files, draw)
        how = draw.randrange(3)
        content = (changed_tar, changed, lambda x, _: x)[how](content, draw)
        content = content if pack is None else pack(content)
        path.write_bytes(changed(content, draw) if how == 2 or draw.random() < 0.2 else content)
        load_data(path, size=16, skip_bad=draw.random() < 0.5)

    return try_it


def try_zip(where: Path, draw: random.Random) -> None:
    files = images_of(draw) | {"labels.csv": b"file,label\n"}
    if draw.random() < 0.3:
        content = as_zip(changed_member(files, draw))
    else:
        content = changed(as_zip(files, draw.choice([0, 8, 12, 14])), draw)
    (where / "images.zip").write_bytes(content)
    load_data(where / "images.zip", size=16, skip_bad=draw.random() < 0.5)


def try_table(where: Path, draw: random.Random) -> None:
    names = [f"{i}.png" for i in range(6)]
    for name in names:
        (where / name).write_bytes(picture(draw, "png"))
    rows = "\n".join(f"{name},{draw.choice(['cat', 'dog'])},train" for name in names)
    (where / "labels.csv").write_bytes(changed(f"file,label,part\n{rows}\n".encode(), draw))
    load_data(where, size=16)


def try_cifar(python: bool) -> Callable[[Path, random.Random], None]:
    def try_it(where: Path, draw: random.Random) -> None:
        for name, content in changed_member(cifar_files(python), draw).items():
            (where / name).write_bytes(content)
        load_data(where)

    return try_it


def try_weights(path: Path) -> None:
    read_weights(path)
    load("cifar-resnet8", path, width=4)


def try_zipped_checkpoint(where: Path, draw: random.Random) -> None:
    content = checkpoint(draw, zipped=True)
    deep = draw.random() < 0.6
    (where / "w.pth").write_bytes(repacked(content, draw, "data.pkl") if deep else changed(content, draw))
    try_weights(where / "w.pth")


def try_old_checkpoint(where: Path, draw: random.Random) -> None:
    (where / "w.th").write_bytes(changed(checkpoint(draw, zipped=False), draw))
    try_weights(where / "w.th")


def try_safetensors(where: Path, draw: random.Random) -> None:
    content = save_tensors(weights())
    deep = draw.random() < 0.6
    (where / "w.safetensors").write_bytes(changed_head(content, draw) if deep else changed(content, draw))
    try_weights(where / "w.safetensors")


def try_npz(where: Path, draw: random.Random) -> None:
    content = as_zip(layers(draw), draw.choice([0, 8]))
    deep = draw.random() < 0.6
    (where / "w.npz").write_bytes(repacked(content, draw, "weight.npy") if deep else changed(content, draw))
    read_npz(where / "w.npz")


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    **{form: folder_with(form) for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm")},
    "tar": archive_of(None),
    "tar.gz": archive_of(gzip.compress),
    "tar.bz2": archive_of(bz2.compress),
    "tar.xz": archive_of(lzma.compress),
    "zip": try_zip,
    "table": try_table,
    "cifar-python": try_cifar(True),
    "cifar-binary": try_cifar(False),
    "pth": try_zipped_checkpoint,
    "th": try_old_checkpoint,
    "safetensors": try_safetensors,
    "npz": try_npz,
}


# ---------------------------------------------------------------- the campaign


class TooSlow(BaseException):
    pass


def causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def outcome(kind: str, number: int, seed: int) -> str:
    """ "read", "refused", or what went wrong."""
    draw = random.Random(f"{kind} {number} {seed}")
    with tempfile.TemporaryDirectory() as name:
        where = Path(name) / "set"
        where.mkdir()
        try:
            signal.alarm(SECONDS)
            KINDS[kind](where, draw)
            return "read"
        except (ValueError, OSError) as error:
            said = str(error)
            if any(isinstance(cause, MemoryError) for cause in causes(error)) or "MemoryError" in said:
                return f"asked for more than a gigabyte: {said}"
            if "\n" in said or len(said) > 2000:
                return f"no sentence: {said!r}"
            if str(where) not in said:
                return f"names no file: {said}"
            return "refused"
        except TooSlow:
            return f"more than {SECONDS} s"
        except BaseException:  # noqa: BLE001
            return traceback.format_exc(limit=-4)
        finally:
            signal.alarm(0)


def stop(*_: object) -> None:
    raise TooSlow


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def campaign(kinds: list[str], count: int, seed: int) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTE, taken + GIGABYTE))
    failures = 0
    for kind in kinds:
        began, worst, found = time.monotonic(), 0.0, Counter[str]()
        for number in range(count):
            start = time.monotonic()
            said = outcome(kind, number, seed)
            worst = max(worst, time.monotonic() - start)
            found[said if said in ("read", "refused") else "failed"] += 1
            if said not in ("read", "refused"):
                failures += 1
                report(f"{kind} {number} (seed {seed}): {said}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        took = f"{time.monotonic() - began:.0f} s, at most {worst:.1f} s a file"
        report(f"{kind}: {dict(found)}, {took}, peak {peak} MB")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    failures = campaign(given.kinds.split(","), given.count, given.seed)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
