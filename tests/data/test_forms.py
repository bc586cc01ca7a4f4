"""What is an image and how it lies: endings, contents, EXIF, archives of every kind, tables of labels."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from quincunx.data import ImageData, Split, Stream, batches, load_data
from quincunx.data.images import begins_like_image


def shaded(value, size=(6, 4), form="png", **options):
    """A picture of one grey, as the bytes of a file; ``size`` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, form, **options)
    return file.getvalue()


def small(classes=("ant", "bee"), count=2, parts=("train", "test")):
    return {
        f"{part}/{name}/{i}.png": shaded(60 * k + i)
        for part in parts
        for k, name in enumerate(classes)
        for i in range(count)
    }


def unpacked(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tarred(path, files, mode="w", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def greys(part):
    return sorted(zip(part.labels.tolist(), part.images[:, 0, 0, 0].tolist(), strict=True))


@pytest.fixture(params=["folder", "tar", "zip"])
def place(request, tmp_path):
    """Puts files where they are read from."""

    def put(files):
        if request.param == "folder":
            return unpacked(tmp_path / "set", files)
        return (tarred if request.param == "tar" else zipped)(tmp_path / f"set.{request.param}", files)

    return put


# ---------------------------------------------------------------- endings and contents

FORMS = ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm", "jpeg2000"]
ENDINGS = [
    ".jfif",
    ".JPG",
    ".Jpeg",
    ".jpe",
    ".WEBP",
    ".TIF",
    ".tiff",
    ".bmp",
    ".dib",
    ".pgm",
    ".pnm",
    ".gif",
    ".jp2",
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_in_any_case(place, ending):
    forms = {".webp": "webp", ".tif": "tiff", ".tiff": "tiff", ".bmp": "bmp", ".dib": "bmp", ".gif": "gif"}
    forms |= {".pgm": "ppm", ".pnm": "ppm", ".jp2": "jpeg2000"}
    data = load_data(
        place({**small(), f"train/bee/x{ending}": shaded(90, form=forms.get(ending.lower(), "jpeg"))})
    )
    assert len(data.train) == 5
    assert data.notes == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["x", "x.image", "x.0001", "x.JPG_large", "x.tmp"])
def test_images_of_other_endings_are_known_by_their_content(place, form, name):
    content = shaded(200, form=form)
    assert begins_like_image(content[:64])
    data = load_data(place({**small(), f"train/bee/{name}": content}))
    assert len(data.train) == 5
    assert greys(data.train)[-1] == (1, pytest.approx(200, abs=2))
    assert data.notes == ()


def test_what_is_no_image_is_counted_and_named_and_texts_are_left_alone(place):
    beside = ["train/bee/notes.txt", "train/bee/LICENSE", "train/list.csv", "README", "train/ant/a.json"]
    others = {"train/bee/x.heic": b"\0\0\0\x18ftypheic", "train/ant/y.xyz": b"BMX text", "train/ant/z": b""}
    source = place({**small(), **dict.fromkeys(beside, b"text"), **others})
    data = load_data(source)
    assert len(data.train) == 4
    (note,) = data.notes
    assert note.startswith("3 files left out whose content is no image that can be read: ")
    assert all(name in note for name in ("x.heic", "y.xyz", "ant/z"))
    with pytest.raises(ValueError, match=r"no images found.*2 files left out.*train/a/1\.heic"):
        load_data(place_like(source, {"train/a/1.heic": b"heic", "train/b/2.heic": b"heic"}))


def place_like(source, files):
    if source.is_dir():
        return unpacked(source.parent / "other", files)
    return (tarred if source.suffix == ".tar" else zipped)(source.parent / f"other{source.suffix}", files)


def test_a_damaged_image_without_an_ending_is_an_unreadable_image(place):
    source = place({**small(), "train/bee/x": shaded(9)[:40]})
    with pytest.raises(ValueError, match="train/bee/x: not a readable image"):
        load_data(source)
    assert "1 unreadable image left out" in load_data(source, skip_bad=True).notes[0]


def test_names_of_several_lines_stay_on_one(place):
    with pytest.raises(ValueError, match="not a readable image") as caught:
        load_data(place({**small(), "train/bee/a\nb.png": b"x"}))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- EXIF

# bright above, a little less bright at the left
SCENE = np.full((12, 8, 3), 20, dtype=np.uint8)
SCENE[:6] = 220
SCENE[:6, :4] = 160
# the transposition that stores a scene under each orientation
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(orientation, form):
    image = Image.fromarray(SCENE)
    way = STORED[orientation]
    image = image if way is None else image.transpose(way)
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    options = (
        {"lossless": True} if form == "webp" else {"quality": 100, "subsampling": 0} if form == "jpeg" else {}
    )
    image.save(file, form, exif=exif, **options)
    return np.asarray(image), file.getvalue()


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_turned_as_viewers_show_them(place, form, orientation):
    pixels, content = stored(orientation, form)
    source = place({f"{part}/{name}/0.{form}": content for part in ("train", "test") for name in "ab"})
    upright, as_stored = load_data(source), load_data(source, exif=False)
    for data, wanted in ((upright, SCENE), (as_stored, pixels)):
        found = data.train.images[0].numpy()
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted).max() <= 12
    assert "exif" not in upright.describe()
    assert as_stored.describe()["exif"] is False


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_streamed_photographs_are_turned_too(tmp_path, augment):
    files = {f"{p}/{n}/0.jpg": stored(6, "jpeg")[1] for p in ("train", "test") for n in "ab"}
    straight = {f"{p}/{n}/0.jpg": stored(1, "jpeg")[1] for p in ("train", "test") for n in "ab"}
    sources = unpacked(tmp_path / "turned", files), unpacked(tmp_path / "straight", straight)
    found = []
    for source in sources:
        data = load_data(source, stream=True, size=8)
        assert isinstance(data.train, Stream)
        draw = torch.Generator().manual_seed(2)
        found.append(next(batches(data.train, data, 2, generator=draw, augment=augment, workers=0))[0])
    assert (found[0] - found[1]).abs().max() < 0.3
    sideways = load_data(sources[0], stream=True, size=8, exif=False)
    images, _ = next(batches(sideways.train, sideways, 2, workers=0))
    assert (images - found[1]).abs().max() > 0.5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_description_does_not_make_an_image_unreadable(tmp_path):
    """EXIF that says nonsense: the image is shown as it is stored."""
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        content = shaded(50, form="jpeg", exif=exif)
        data = load_data(unpacked(tmp_path, {**small(), "train/ant/0.png": content}))
        assert len(data.train) == 4


# ---------------------------------------------------------------- archives

PACKED = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PACKED["lzma"] = lambda content: lzma.compress(content, lzma.FORMAT_ALONE)
TARS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("form", TARS)
@pytest.mark.parametrize("pack", PACKED)
@pytest.mark.parametrize("prefix", ["", "./", "a/" * 20, "ü/", "long" * 22 + "/and/" + "longer" * 11 + "/"])
def test_tar_archives_of_every_kind(tmp_path, form, pack, prefix):
    files = {f"{prefix}{name}": content for name, content in small().items()}
    path = tarred(tmp_path / "set", files, form=TARS[form])
    path.write_bytes(PACKED[pack](path.read_bytes()))
    data = load_data(path)
    assert data.classes == ("ant", "bee")
    assert greys(data.train) == greys(data.test) == [(0, 0), (0, 1), (1, 60), (1, 61)]


@pytest.mark.parametrize(
    "form", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_zip_archives_of_every_kind(tmp_path, form):
    files = {f"deep/{name}": content for name, content in small().items()}
    files |= {"__MACOSX/deep/train/ant/._0.png": b"x", "deep/train/ant/.hidden.png": b"x", "deep/train/": b""}
    data = load_data(zipped(tmp_path / "set.data", files, form))
    assert greys(data.train) == greys(data.test) == [(0, 0), (0, 1), (1, 60), (1, 61)]
    assert data.notes == ()


def test_zip_archives_that_are_damaged_or_locked(tmp_path):
    path = zipped(tmp_path / "set.zip", small(), zipfile.ZIP_STORED)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[content.index(b"IDAT")] ^= 1
    locked = content.replace(b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0").replace(
        b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"
    )
    for other in (content[:-30], content[: len(content) // 2], bytes(damaged), locked, b"PK\3\4", b"PK\5\6"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=rf"^{path}: not a readable zip archive, or cut short \("):
            load_data(path)


def test_a_link_in_a_zip_archive_leads_within_it(tmp_path):
    path = zipped(tmp_path / "set.zip", small())
    with zipfile.ZipFile(path, "a") as archive:
        for name, target in (("train/ant/l.png", "../bee/0.png"), ("train/ant/out.png", "/etc/passwd")):
            link = zipfile.ZipInfo(name)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, target)
    data = load_data(path, skip_bad=True)
    assert greys(data.train) == [(0, 0), (0, 1), (0, 60), (1, 60), (1, 61)]
    assert "1 unreadable image left out" in data.notes[0]


def test_official_sets_in_zip_archives(tmp_path):
    record = bytes([3]) + bytes(3072)
    files = {f"cifar/data_batch_{i}.bin": record * 2 for i in range(1, 6)}
    files |= {"cifar/test_batch.bin": record, "cifar/batches.meta.txt": "\n".join("abcdefghij").encode()}
    data = load_data(zipped(tmp_path / "c.zip", files))
    assert (data.name, len(data.train), data.test.labels.tolist()) == ("cifar10", 10, [3])


# ---------------------------------------------------------------- layouts


def table(rows, head="file,label"):
    return "\n".join([head, *rows, ""]).encode()


FLAT = {f"pictures/{i}.png": shaded(10 * i) for i in range(6)}
KINDS = ["cat", "dog", "cat", "emu", "dog", "emu"]


@pytest.mark.parametrize("full", [True, False], ids=["paths", "names"])
@pytest.mark.parametrize("head", ["file,label,part", "Filename,Class,Split", "image,category,set"])
def test_labels_in_a_table(place, full, head):
    parts = ["train", "train", "test", "train", "val", "test"]
    rows = [
        f"{name if full else name.rpartition('/')[2]},{kind},{part}"
        for name, kind, part in zip(FLAT, KINDS, parts, strict=True)
    ]
    data = load_data(place({**FLAT, "labels.csv": table(rows, head)}))
    assert data.classes == ("cat", "dog", "emu")
    assert greys(data.train) == [(0, 0), (1, 10), (2, 30)]
    assert greys(data.test) == [(0, 20), (1, 40), (2, 50)]


def test_labels_that_are_numbers_are_the_classes_numbers(place):
    rows = [f"{name},{number}" for name, number in zip(FLAT, (10, 2, 2, 10, 0, 0), strict=True)]
    data = load_data(place({**FLAT, "labels.csv": table(rows)}), holdout=0.5)
    assert data.classes == tuple(map(str, range(11)))
    assert sorted(greys(data.train) + greys(data.test)) == [
        (0, 40),
        (0, 50),
        (2, 10),
        (2, 20),
        (10, 0),
        (10, 30),
    ]
    challenge = load_data(place({**FLAT, "labels.csv": table(rows, "file,ilsvrc_index")}), holdout=0.5)
    assert len(challenge.classes) == 1000


def test_images_that_a_table_does_not_name_are_counted(place):
    rows = [f"{name},{kind}" for name, kind in zip(FLAT, KINDS, strict=True)][:4]
    data = load_data(place({**FLAT, "labels.csv": table(rows)}))
    assert data.notes[0].startswith("2 images left out that labels.csv does not name: ")


TABLES = {
    "no label": (table(["0.png"], "file,author"), "expected columns file and label, found file, author"),
    "empty": (b"", "found none"),
    "not text": (b"\xff\xfe\0\0", "no table of labels"),
    "twice": (table(["0.png,a", "1.png,b"]), "the row '0.png' is meant for"),
}


@pytest.mark.parametrize(("content", "message"), TABLES.values(), ids=TABLES)
def test_tables_that_cannot_be_used(place, content, message):
    twice = {"train/0.png": shaded(1), "train/1.png": shaded(1), "test/0.png": shaded(2)}
    flat = twice if message.startswith("the row") else FLAT
    with pytest.raises(ValueError, match=message):
        load_data(place({**flat, "labels.csv": content}))


def test_folders_of_classes_win_over_a_table(place):
    assert load_data(place({**small(), "labels.csv": b"nonsense"})).classes == ("ant", "bee")


@pytest.mark.parametrize("files", [small(parts=["test"]), small(parts=["val"])], ids=["test", "val"])
def test_test_images_alone(place, files):
    source = place(files)
    with pytest.raises(
        ValueError, match=r"0 class of training images.*train/CLASS/\*\.png.*all of them are test images"
    ):
        load_data(source)
    data = load_data(source, test_alone=True)
    assert (len(data.train), data.classes) == (0, ("ant", "bee"))
    assert greys(data.test) == [(0, 0), (0, 1), (1, 60), (1, 61)]
    assert "test images alone" in data.notes[0]
    images, labels = next(batches(data.test, data, 4))
    assert labels.tolist() == [0, 0, 1, 1]
    assert torch.isfinite(images).all()
    with pytest.raises(ValueError, match=r"no images to read, only the other part has some"):
        batches(data.train, data, 4)


def test_test_images_alone_are_streamed_as_well(tmp_path):
    data = load_data(unpacked(tmp_path, small(parts=["val"])) / "val", test_alone=True, stream=True, size=4)
    assert (len(data.train), len(data.test)) == (0, 4)


def test_a_refused_layout_says_which_ones_there_are(place):
    for files in ({"test/0.png": shaded(1)}, {"train/ant/0.png": shaded(1)}, {"notes.txt": b"x"}):
        with pytest.raises(ValueError, match=r"train/CLASS/\*\.png and test/CLASS/\*\.png.*labels\.csv"):
            load_data(place_new(place, files))


def place_new(place, files):
    """The same place, emptied first."""
    source = place(files)
    if source.is_dir():
        for path in source.rglob("*.*"):
            if str(path.relative_to(source)) not in files:
                path.unlink()
    return source


# ---------------------------------------------------------------- mean and deviation

WRONG = {
    "of bytes": (
        (123.0, 116.0, 103.0),
        (58.0, 57.0, 57.0),
        r"mean=\(123.0, 116.0, 103.0\): .* divide by 255",
    ),
    "deviation of bytes": ((0.5,) * 3, (58.0, 57.0, 57.0), r"std=\(58.0, 57.0, 57.0\): .* divide by 255"),
    "negative": ((-0.5,) * 3, (0.5,) * 3, r"mean=.*expected numbers in \[0, 1\]"),
    "none": ((float("nan"),) * 3, (0.5,) * 3, "mean="),
    "zero": ((0.5,) * 3, (0.0,) * 3, r"std=.*expected numbers in \(0, 1\]"),
    "fewer": ((0.5,) * 3, (0.5,), "expected 3 numbers"),
}


@pytest.mark.parametrize(("mean", "std", "message"), WRONG.values(), ids=WRONG)
def test_a_mean_that_no_image_in_0_1_has_is_refused(mean, std, message):
    split = Split(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.arange(2))
    good = ImageData("black", split, split, ("a", "b"), (0.0, 0.5, 1.0), (1.0, 1 / 255, 0.5), "none")
    assert json.dumps(good.describe())
    with pytest.raises(ValueError, match=message):
        ImageData("black", split, split, ("a", "b"), mean, std, "none")
