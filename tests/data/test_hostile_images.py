"""Files that claim more than they hold: nothing is believed before it is compared with the file."""

import bz2
import gzip
import io
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers import fuzz_files
from quincunx.data import archives, images, load_data
from quincunx.data.archives import members, resolved
from quincunx.data.images import ImageEntry, decoded


def shaded(value, size=(6, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, "png")
    return file.getvalue()


GOOD = {f"{part}/{name}/0.png": shaded(k) for part in ("train", "test") for k, name in enumerate("xy")}


def folder(root, more):
    for name, content in (GOOD | more).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, rows):
    """Grey pixels; so many rows are really there."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(rows * (width + 1)), 9))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(1, 300_000), (300_000, 1), (3, 200_000)])
@pytest.mark.parametrize("size", [5, 224])
def test_a_strip_of_pixels_is_cut_before_it_is_enlarged(tmp_path, shape, size, monkeypatch):
    made = []
    whole = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest, **more: made.append(size) or whole(self, size, *rest, **more),
    )
    source = folder(tmp_path, {"train/x/strip.png": png(*shape, shape[1])})
    data = load_data(source, size=size)
    assert data.train.images.shape == (3, size, size, 3)
    assert max(width * height for width, height in made) <= 16 * size * size


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(40_000, 40_000, 3), ""),
        (png(3000, 3000, 3), "3000 x 3000 pixels in a file"),
        (b"P6 9000 9000 255\n" + bytes(50), "9000 x 9000 pixels in a file"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(30), ""),
        (b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0), ""),
    ],
    ids=["png", "smaller png", "ppm", "gif", "bmp"],
)
def test_sizes_that_a_file_cannot_hold_are_not_believed(tmp_path, content, said, monkeypatch):
    decoded_sizes = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded_sizes.append(self.size) or load(self))
    source = folder(tmp_path, {"train/x/claims": content})
    with pytest.raises(ValueError, match=rf"train/x/claims: not a readable image \(.*{said}"):
        load_data(source, size=8)
    assert all(width * height < 5000 for width, height in decoded_sizes), decoded_sizes


def test_large_photographs_are_still_read(tmp_path):
    """Ten million pixels in a file as long as such files are."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.tile(pixels, (32, 33, 1))).save(file, "jpeg", quality=60)
    found = decoded(ImageEntry("a", "", None, file.getvalue()), np.asarray)
    assert found.shape == (3200, 3300, 3)


def test_no_more_is_decoded_than_waits_to_be_taken(monkeypatch):
    monkeypatch.setattr(images, "_WAITING", 4 * 6 * 6 * 3)
    monkeypatch.setattr(images, "_DECODE_AT_ONCE", 8)
    entries = [ImageEntry(str(i), "", None, shaded(i)) for i in range(200)]
    found = list(images.in_threads(entries, np.asarray))
    assert [entry.name for entry, _ in found] == list(map(str, range(200)))
    assert [int(image[0, 0, 0]) for _, image in found] == list(range(200))


def test_few_bytes_of_files_wait_to_be_decoded(monkeypatch):
    """Large files are handed over one at a time, whatever the number of threads."""
    monkeypatch.setattr(images, "_WAITING_FILES", 1 << 20)
    monkeypatch.setattr(images, "_DECODE_BYTES", 1 << 10)
    asked, taken, ahead = [], [], []

    def entries():
        for i in range(12):
            asked.append(i)
            ahead.append(len(asked) - len(taken))
            yield ImageEntry(str(i), "", None, shaded(i) + bytes(3 << 18))

    for entry, _ in images.in_threads(entries(), np.asarray):
        taken.append(entry.name)
    assert taken == list(map(str, range(12)))
    assert max(ahead) <= 3


# ---------------------------------------------------------------- tar


def header(name, size=0, kind=b"0", target="", number=None):
    member = tarfile.TarInfo(name)
    member.linkname = target
    found = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    found[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    found[156:157] = kind
    if number is not None:
        found[386:398], found[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
        found[483:495] = b"\x80" + number.to_bytes(11, "big")
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found)
    return bytes(found)


def block(content):
    return content + bytes(-len(content) % 512)


BODY = b"".join(header(name, len(content)) + block(content) for name, content in GOOD.items())
END = bytes(1024)
PACK = {"plain": bytes, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
HUGE = {
    "a file": header("train/x/1.png", 1 << 45),
    "an unknown kind": header("train/x/1.png", 1 << 45, b"Q"),
    "a long name": header("a", 1 << 45, b"L") + bytes(512),
    "a long link": header("a", 1 << 33, b"K") + bytes(512),
    "a list": header("a", 1 << 60, b"x") + bytes(512),
    "a list for all": header("a", 1 << 40, b"g") + bytes(512),
    "a list of digits": header("a", 1 << 19, b"x") + b"1" * (1 << 19),
    "a size in a list": header("a", 22, b"x") + block(b"22 size=9999999999999\n") + header("train/x/1.png"),
    "no number": header("train/x/1.png").replace(b"00000000000\0", b"9zzzzzzzzzz\0", 1),
}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("part", HUGE.values(), ids=HUGE)
def test_what_headers_claim_is_not_believed(tmp_path, part, pack):
    path = tmp_path / "claims.tar"
    path.write_bytes(PACK[pack](BODY + part + END))
    with pytest.raises(ValueError, match=rf"^{path}: not a readable tar archive, or cut short \(") as caught:
        load_data(path, skip_bad=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", PACK)
def test_a_file_with_holes_is_an_unreadable_image(tmp_path, pack):
    path = tmp_path / "holes.tar"
    holes = header("train/x/1.png", 512, b"S", number=1 << 38) + bytes(512)
    path.write_bytes(PACK[pack](BODY + holes + END))
    with pytest.raises(ValueError, match=r"train/x/1\.png: not a readable image"):
        load_data(path)
    assert len(load_data(path, skip_bad=True).train) == 2


def sparse(name, content, form):
    """A member as tar --sparse writes it, one that is all data."""
    if form == "old":
        return header(name, len(content), b"S") + block(content)
    entries = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    member = tarfile.TarInfo("GNUSparseFile.0/0")
    member.pax_headers = entries | {"GNU.sparse.realsize": str(len(content))}
    packed = block(b"1\n0\n%d\n" % len(content)) + content
    member.size = len(packed)
    return member.tobuf(tarfile.PAX_FORMAT) + block(packed)


@pytest.mark.parametrize("form", ["old", "pax"])
@pytest.mark.parametrize("name", ["set/labels.csv", "cifar-10-batches-py/test_batch"])
def test_what_is_no_image_and_has_holes_is_refused_by_name(tmp_path, name, form):
    path, image = tmp_path / "holes.tar", shaded(0)
    images = header("set/0.png", len(image)) + block(image) if name.endswith(".csv") else b""
    path.write_bytes(sparse(name, b"file,label\n0.png,x\n", form) + images + END)
    said = rf"^{path}[:/]\S*{name.split('/')[1]}: a file with holes \(sparse\), which is not read$"
    with pytest.raises(ValueError, match=said):
        load_data(path)


@pytest.mark.parametrize("form", ["old", "pax"])
def test_an_image_with_holes_is_passed_over_by_its_own_name(tmp_path, form):
    path = tmp_path / "holes.tar"
    path.write_bytes(BODY + sparse("train/x/1.png", shaded(9), form) + END)
    with pytest.raises(ValueError, match=r"train/x/1\.png: not a readable image"):
        load_data(path)
    assert len(load_data(path, skip_bad=True).train) == 2


@pytest.mark.parametrize("pack", ["gz", "xz", "bz2"])
def test_archives_do_not_unpack_without_end(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(archives, "_ANY", 1 << 20)
    path = tmp_path / "bomb.tar"
    path.write_bytes(PACK[pack](BODY + header("notes.txt", 20 << 20) + bytes(20 << 20) + END))
    with pytest.raises(ValueError, match=rf"^{path}: .*unpacks to more than 200 times its size"):
        load_data(path)


def test_zip_archives_do_not_unpack_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 1 << 20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (GOOD | {"train/x/1.png": bytes(3 << 20)}).items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"train/x/1\.png: not a readable image"):
        load_data(path)
    # one that says that it is small
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 3 << 20), struct.pack("<I", 900)))
    with pytest.raises(ValueError, match=rf"^{path}: not a readable zip archive"):
        load_data(path)


def test_a_chain_of_links_is_followed_once(tmp_path):
    count = 3000
    links = [
        header(f"train/x/l{i}.png", 0, b"2", f"l{i + 1}.png" if i < count - 1 else "0.png")
        for i in range(count)
    ]
    path = tmp_path / "chain.tar.gz"
    path.write_bytes(gzip.compress(BODY + b"".join(links) + END))
    data = load_data(path)
    assert len(data.train) == 2 + count
    steps = []

    class Counted(dict):
        def __getitem__(self, key):
            steps.append(key)
            return super().__getitem__(key)

    ends = resolved(Counted({f"l{i}": f"l{i + 1}" for i in range(count)}), {f"l{count}"})
    assert set(ends.values()) == {f"l{count}"}
    assert len(steps) == count
    assert resolved({"a": "b", "b": "a", "c": "a", "d": "nowhere"}, {"e"}) == {}


def test_a_file_to_which_many_links_lead_is_read_and_decoded_once(tmp_path, monkeypatch):
    count = []
    whole = images._loaded
    monkeypatch.setattr(images, "_loaded", lambda image, exif: count.append(1) or whole(image, exif))
    links = b"".join(header(f"train/x/l{i}.png", 0, b"1", "big.png") for i in range(500))
    pool = shaded(77)
    path = tmp_path / "many.tar.xz"
    path.write_bytes(lzma.compress(BODY + links + header("big.png", len(pool)) + block(pool) + END))
    data = load_data(path)
    assert len(data.train) == 502
    # of the file itself, and a few times where threads meet it at once
    assert len(count) < 30


def test_members_are_read_in_one_pass(tmp_path):
    """Contents that nobody asks for are passed over, heads are read once."""
    path = tmp_path / "a.tar.bz2"
    path.write_bytes(bz2.compress(BODY + END))
    heads = [(member.name, member.head(), member.head()) for member in members(path)]
    assert heads == [(name, content[:64], content[:64]) for name, content in GOOD.items()]
    contents = [member.content() for member in members(path)]
    assert contents == list(GOOD.values())
    both = [(member.head(), member.content())[1] for member in members(path)]
    assert both == contents


# ---------------------------------------------------------------- folders


def test_links_between_folders_are_no_maze(tmp_path):
    """Two links in each of thirty folders to the next one: a thousand million ways to one image."""
    root = folder(tmp_path / "set", {})
    maze = tmp_path / "maze"
    for i in range(30):
        (maze / str(i)).mkdir(parents=True)
        for name in ("left", "right"):
            (maze / str(i) / name).symlink_to(maze / str(i + 1))
    (maze / "30").mkdir()
    (maze / "30" / "q.png").write_bytes(shaded(9))
    (root / "train" / "x" / "maze").symlink_to(maze / "0")
    assert len(load_data(root).train) == 3


# ---------------------------------------------------------------- anything


@pytest.mark.timeout(600)
def test_damaged_files_give_one_sentence_or_a_result(tmp_path):
    """A small campaign; the environment variable QUINCUNX_FUZZ says how many files of each kind."""
    count = int(os.environ.get("QUINCUNX_FUZZ", "5"))
    command = [sys.executable, fuzz_files.__file__, "--count", str(count), "--seed", "7"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert found.stdout.count("peak") == len(fuzz_files.KINDS)


def test_the_campaign_sees_what_goes_wrong(monkeypatch):
    """A traceback, an error without a file, one of two lines, and memory that is asked for."""

    def failing(error):
        def fail(where, draw):
            raise error(where)

        return fail

    def starved(where):
        error = ValueError(f"{where}: too much")
        error.__cause__ = MemoryError()
        return error

    for error, said in (
        (lambda where: KeyError("x"), "KeyError"),
        (lambda where: ValueError("no name"), "names no file"),
        (lambda where: ValueError(f"{where}: two\nlines"), "no sentence"),
        (starved, "more than a gigabyte"),
        (lambda where: ValueError(f"{where}: fine"), "refused"),
    ):
        monkeypatch.setitem(fuzz_files.KINDS, "broken", failing(error))
        assert said in fuzz_files.outcome("broken", 0, 0)


@pytest.mark.parametrize("kind", fuzz_files.KINDS)
def test_the_campaign_starts_from_files_that_can_be_read(kind, monkeypatch):
    for name in ("changed", "changed_png", "changed_tar", "changed_head"):
        monkeypatch.setattr(fuzz_files, name, lambda content, draw: content)
    assert fuzz_files.outcome(kind, 1, 1) == "read"


@pytest.mark.parametrize("kind", ["xz", "lzma", "zip"])
def test_a_window_of_gigabytes_is_not_given(tmp_path, kind):
    """Lzma asks for memory to look back before the first byte comes."""
    path = tmp_path / "window"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            for name, content in GOOD.items():
                archive.writestr(name, content)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            member = archive.infolist()[1]
        at = member.header_offset + 30 + len(member.filename) + 5
        content[at : at + 4] = (3 << 30).to_bytes(4, "little")
    elif kind == "lzma":
        content = bytearray(lzma.compress(BODY + END, lzma.FORMAT_ALONE))
        content[1:5] = (3 << 30).to_bytes(4, "little")
    else:
        # a preset with another window would take that memory here
        content = bytearray(lzma.compress(BODY + END))
        at = content.index(b"\x21\x01", 12) + 2
        content[at] = 39
        begin, size = 12, (content[12] + 1) * 4
        content[begin + size - 4 : begin + size] = struct.pack(
            "<I", zlib.crc32(content[begin : begin + size - 4])
        )
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: not a readable (tar|zip) archive.*(window|[Mm]emory)"):
        load_data(path)
