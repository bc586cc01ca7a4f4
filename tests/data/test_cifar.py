"""Official CIFAR archives: every form gives the same images; what is altered, cut or hostile is refused."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import re
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quincunx.data import cifar, download, load_data, memory
from quincunx.data.unpickle import read_cifar_pickle

SETS = {"cifar10": 10, "cifar100": 100}
FORMS = {form.archive: form for form in cifar.FORMS}
PER_FILE = 12


class OldPickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its text, as in the official files."""

    def save(self, value, *arguments):
        if type(value) is not bytes or id(value) in self.memo:
            return super().save(value, *arguments)
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)


def old_pickle(value):
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch_of(form, images, labels):
    """A file of planes [N, 3072] and classes, as bytes."""
    if isinstance(form.labels, int):
        return b"".join(
            bytes([7] * (form.labels - 1) + [label]) + image.tobytes()
            for image, label in zip(images, labels, strict=True)
        )
    return old_pickle({b"data": images, form.labels.encode(): labels, b"filenames": [b"a.png"] * len(labels)})


def content_of(form, names=None, change=lambda name, images, labels: None):
    """{file name: bytes} of a small set, and what is in it: {file name: (planes, classes)}."""
    rng = np.random.default_rng(form.classes)
    names = names or [f"class_{i}" for i in range(form.classes)]
    files, truth = {}, {}
    for name in (*form.train, form.test):
        images = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        labels = rng.integers(0, form.classes, PER_FILE).tolist()
        change(name, images, labels)
        files[name], truth[name] = batch_of(form, images, labels), (images, labels)
    files[form.meta] = (
        old_pickle({form.names.encode(): [name.encode() for name in names]})
        if form.names
        else "\n".join([*names, "", ""]).encode()
    )
    return files, truth


def written(root, form, files, kind):
    """As a folder or an archive that does not have the official name."""
    if kind == "folder":
        folder = root / "unpacked"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder
    return packed(root / "some.tar.gz", form, files)


def packed(path, form, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{form.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request):
    return request.param


@pytest.fixture(params=["folder", "archive"])
def kind(request):
    return request.param


def test_images_classes_and_names_are_those_of_the_files(tmp_path, form, kind):
    files, truth = content_of(form)
    data = load_data(written(tmp_path, form, files, kind))
    assert (data.name, data.augment, data.size, data.in_channels) == (form.of, "cifar", (32, 32), 3)
    assert data.classes == tuple(f"class_{i}" for i in range(form.classes))
    for split, names in ((data.train, form.train), (data.test, (form.test,))):
        assert split.labels.tolist() == [label for name in names for label in truth[name][1]]
        assert split.images.is_contiguous()
        planes = np.concatenate([truth[name][0] for name in names])
        for index, (y, x, channel) in ((0, (0, 0, 0)), (3, (5, 31, 2)), (PER_FILE - 1, (31, 0, 1))):
            # the format's own words: the first 1024 bytes are the red channel, row by row
            assert split.images[index, y, x, channel] == planes[index, 1024 * channel + 32 * y + x]
        assert np.array_equal(split.images.permute(0, 3, 1, 2).reshape(-1, 3072).numpy(), planes)
    assert f"official set has {form.counts[0]}" in data.notes[0]


def test_all_forms_of_one_set_are_one_set(tmp_path):
    for name in SETS:
        found = []
        for form in (form for form in cifar.FORMS if form.of == name):
            (tmp_path / form.folder).mkdir()
            found.append(load_data(packed(tmp_path / form.folder / "a.tar", form, content_of(form)[0])))
        assert found[0].describe() == found[1].describe()
        assert torch.equal(found[0].train.images, found[1].train.images)
        assert torch.equal(found[0].test.labels, found[1].test.labels)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_of_newer_kinds_are_read_or_refused_by_name(protocol):
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    content = pickle.dumps({"data": images, "labels": [1, 2]}, protocol=protocol)
    if protocol == 5:  # builds arrays through a function that the official files do not use
        with pytest.raises(ValueError, match="_frombuffer, which is refused"):
            read_cifar_pickle("x", content)
    else:
        found = read_cifar_pickle("x", content)
        assert found["labels"] == [1, 2]
        assert (found["data"].shape, found["data"].content) == ((2, 3072), images.tobytes())


def test_size_resizes(tmp_path):
    form = cifar.FORMS[0]
    source = written(tmp_path, form, content_of(form, change=lambda n, x, y: x.fill(80))[0], "folder")
    data = load_data(source, size=20)
    assert data.size == (20, 20)
    assert data.train.images.unique().tolist() == [80]
    assert torch.equal(load_data(source, size=32).train.images, load_data(source).train.images)


# ---- what is refused


def test_a_class_out_of_range_is_refused_with_file_and_record(tmp_path, form, kind):
    wrong = form.train[-1]

    def change(name, _, labels):
        if name == wrong:
            labels[5] = form.classes

    source = written(tmp_path, form, content_of(form, change=change)[0], kind)
    with pytest.raises(
        ValueError, match=rf"/{wrong}: record 5 \(from 0\) has the class {form.classes}, expected 0 to"
    ):
        load_data(source)


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1, "the class -1,"), (2**80, f"the class {2**80},"), ("3", "by a str"), (None, "by a None")],
)
def test_a_label_that_is_no_class_is_refused(tmp_path, label, message):
    form = FORMS["cifar-10-python.tar.gz"]

    def change(name, _, labels):
        if name == "test_batch":
            labels[2] = label

    source = written(tmp_path, form, content_of(form, change=change)[0], "folder")
    with pytest.raises(ValueError, match=f"/test_batch: record 2 .from 0. .*{message}"):
        load_data(source)


def test_a_missing_file_is_named(tmp_path, form, kind):
    files, _ = content_of(form)
    del files[form.meta]
    source = written(tmp_path, form, files, kind)
    with pytest.raises(ValueError, match=f"is like {form.archive}, but lacks {form.meta}"):
        load_data(source)


def test_a_cut_file_is_refused(tmp_path, form, kind):
    files, _ = content_of(form)
    files[form.test] = files[form.test][:-100]
    source = written(tmp_path, form, files, kind)
    with pytest.raises(ValueError, match=f"/{form.test}: .*(cut short|not a file of CIFAR)"):
        load_data(source)


@pytest.mark.parametrize("names", [["a", "b"], ["a"] * 10, [*"abcdefghij", "a"]])
def test_wrong_class_names_are_refused(tmp_path, names):
    for form in cifar.FORMS[:2]:
        (tmp_path / form.folder).mkdir()
        source = written(tmp_path / form.folder, form, content_of(form, names)[0], "archive")
        with pytest.raises(ValueError, match=f"{form.meta}: {len(names)} class names, expected 10"):
            load_data(source)


def test_a_truncated_archive_without_the_official_name_is_refused(tmp_path, form):
    path = packed(tmp_path / "some.tar.gz", form, content_of(form)[0])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"some\.tar\.gz: not a readable tar archive, or cut short"):
        load_data(path)


def test_a_plain_archive_cut_between_two_files_is_refused(tmp_path, form):
    path = packed(tmp_path / "some.tar", form, content_of(form)[0], "w")
    path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(300))
    with pytest.raises(ValueError, match=r"some\.tar: not a readable tar archive, or cut short"):
        load_data(path)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_archive_of_the_official_name_has_the_official_checksum(tmp_path, form, share):
    path = packed(tmp_path / form.archive, form, content_of(form)[0])
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(content)
    found = hashlib.md5(content).hexdigest()
    with pytest.raises(
        ValueError, match=rf"{form.archive}: has the checksum \(MD5\) {found}, expected {SUMS[form.archive]}"
    ):
        load_data(path)


# written once more, so that a slip in one of the two is seen
SUMS = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}


@pytest.mark.parametrize("options", [{"stream": True}, {"test_source": "."}])
def test_options_that_do_not_fit_an_official_set(tmp_path, options):
    form = cifar.FORMS[0]
    source = written(tmp_path, form, content_of(form)[0], "folder")
    for known in (source, "cifar10"):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_data(known, **options)


def test_too_little_memory_is_said_before_reading(tmp_path, monkeypatch):
    form = cifar.FORMS[0]
    source = written(tmp_path, form, content_of(form)[0], "folder")
    monkeypatch.setattr(memory, "available", lambda: 2**28)
    with pytest.raises(ValueError, match=r"needs 0\.3 GB of memory, 0\.2 GB are free"):
        load_data(source)


# ---- hostile pickles


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch pwned"), "(posix|nt).system"),
        (Runs(eval, "1"), "(__builtin__|builtins).eval"),
        (Runs(getattr, "", "join"), "(__builtin__|builtins).getattr"),
        (Runs(open, "pwned", "w"), "io.open|_io.open"),
        (np.float64(1.0), "multiarray.scalar"),
        (np.frombuffer, "frombuffer"),
    ],
)
def test_what_a_pickle_asks_for_is_refused_by_name(tmp_path, monkeypatch, value, name, protocol):
    monkeypatch.chdir(tmp_path)
    form = FORMS["cifar-10-python.tar.gz"]
    files, _ = content_of(form)
    files["data_batch_2"] = pickle.dumps({"data": value, "labels": []}, protocol=protocol)
    source = written(tmp_path, form, files, "folder")
    with pytest.raises(ValueError, match=f"/data_batch_2: .*it asks for .*({name}), which is refused"):
        load_data(source)
    assert not (tmp_path / "pwned").exists()


ARRAYS = {
    "objects": (np.array([1, "a"], dtype=object), "not of bytes in row-major order"),
    "floats": (np.zeros((2, 3072)), "not of bytes in row-major order"),
    "as-large-as-bytes": (np.zeros((2, 3072), dtype=np.int8), "not of bytes in row-major order"),
    "by-columns": (np.asfortranarray(np.zeros((2, 3072), dtype=np.uint8)), "not of bytes in row-major order"),
    "one-dimension": (np.zeros(6144, dtype=np.uint8), r"an array of \(6144,\) and 2 classes"),
    "narrow": (np.zeros((2, 3071), dtype=np.uint8), r"an array of \(2, 3071\) and 2 classes"),
    "too-few": (np.zeros((1, 3072), dtype=np.uint8), r"an array of \(1, 3072\) and 2 classes"),
}


@pytest.mark.parametrize(("array", "message"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_of_another_kind_are_refused(tmp_path, array, message):
    form = FORMS["cifar-100-python.tar.gz"]
    files, _ = content_of(form)
    files["train"] = old_pickle({b"data": array, b"fine_labels": [0, 1]})
    source = written(tmp_path, form, files, "folder")
    with pytest.raises(ValueError, match=f"/train: .*{message}"):
        load_data(source)


def test_an_array_with_other_content_than_its_shape_says_is_refused():
    content = old_pickle({b"data": np.zeros((2, 5), dtype=np.uint8)})
    assert content.count(b"K\x05") == 1
    with pytest.raises(ValueError, match=r"an array of \(2, 6\) with other content"):
        read_cifar_pickle("x", content.replace(b"K\x05", b"K\x06"))


@given(st.data())
def test_any_damage_to_a_pickle_is_refused_or_harmless(data):
    content = bytearray(old_pickle({b"data": np.zeros((2, 8), dtype=np.uint8), b"labels": [1, 2]}))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ValueError):  # nothing else is raised
        assert isinstance(read_cifar_pickle("x", content), dict)


def test_stand_ins_cannot_be_changed_by_a_pickle():
    """BUILD sets attributes of what lies on the stack: nothing that outlives the reading takes them."""
    for module, name in (("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct")):
        for state in (b"}X\x03\0\0\0abcK\x01s", b"N}X\x03\0\0\0abcK\x01s\x86"):
            program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + state + b"b."
            with pytest.raises(ValueError, match="no attribute"):
                read_cifar_pickle("x", program)
    good = read_cifar_pickle("x", old_pickle({b"data": np.ones((1, 2), dtype=np.uint8)}))
    assert good["data"].content == b"\x01\x01"


# ---- by name: kept, downloaded, refused


class Site:
    """A web server of one archive, which may lie about it."""

    def __init__(self, content, cut=0, says_length=True, status=200):
        site = self
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                self.send_response(status)
                if says_length:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - cut])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/~kriz/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv("QUINCUNX_DATA", str(tmp_path / "kept"))
    monkeypatch.setattr(cifar, "SITE", "http://127.0.0.1:9/~kriz/")  # nothing listens there
    return tmp_path / "kept"


@pytest.fixture(params=SETS)
def published(request, tmp_path, monkeypatch):
    """(name of the set, name of its archive, a small archive whose sum counts as the official one)."""
    form = next(form for form in cifar.FORMS if form.of == request.param)
    content = packed(tmp_path / "original", form, content_of(form)[0]).read_bytes()
    monkeypatch.setitem(cifar.CHECKSUMS, form.archive, hashlib.md5(content).hexdigest())
    return form.of, form.archive, content


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("says_length", [True, False])
def test_a_set_is_downloaded_once(published, kept, monkeypatch, says_length):
    name, archive, content = published
    seen = []
    with Site(content, says_length=says_length) as site:
        monkeypatch.setattr(cifar, "SITE", site.url)
        first = load_data(name, progress=lambda done, total: seen.append((done, total)))
        second = load_data(name)
    assert site.asked == [f"/~kriz/{archive}"]
    assert seen[-1] == (len(content), len(content) if says_length else None)
    assert leftovers(kept) == [archive]
    assert (kept / archive).read_bytes() == content
    assert first.describe() == second.describe()
    assert len(first.classes) == SETS[name]


FAILURES = {
    "body-cut": ({"cut": 300}, ConnectionError, r"ended after \d+ of \d+ bytes.*fetch http"),
    "body-cut-unseen": ({"cut": 300, "says_length": False}, ValueError, "checksum"),
    "not-found": ({"status": 404}, ConnectionError, "404.*fetch http"),
}


@pytest.mark.parametrize(("site", "error", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_download_leaves_nothing_behind(published, kept, monkeypatch, site, error, message):
    name, _, content = published
    with Site(content, **site) as server:
        monkeypatch.setattr(cifar, "SITE", server.url)
        with pytest.raises(error, match=message):
            load_data(name)
    assert leftovers(kept) == []


def test_what_a_killed_download_left_is_removed_by_the_next(published, kept, monkeypatch):
    name, archive, content = published
    (kept / f".{archive}.01234567.part").mkdir(parents=True)
    (kept / f".{archive}.01234567.part" / archive).write_bytes(content[:50])
    with Site(content) as site:
        monkeypatch.setattr(cifar, "SITE", site.url)
        load_data(name)
    assert leftovers(kept) == [archive]
    assert (kept / archive).stat().st_mode & 0o077 == 0o066 & ~umask()


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_an_altered_download_names_both_checksums(published, kept, monkeypatch):
    name, archive, content = published
    altered = content[:50] + bytes([content[50] ^ 1]) + content[51:]
    found, expected = hashlib.md5(altered).hexdigest(), cifar.CHECKSUMS[archive]
    with Site(altered) as site:
        monkeypatch.setattr(cifar, "SITE", site.url)
        with pytest.raises(ValueError, match=f"{archive}: .*{found}, expected {expected}"):
            load_data(name)
    assert leftovers(kept) == []


def test_without_a_network_one_sentence_says_what_to_put_where(kept):
    with pytest.raises(ConnectionError) as caught:
        load_data("cifar100")
    said = str(caught.value)
    assert re.search(r"cifar-100-binary\.tar\.gz is not in .*kept and could not be downloaded", said)
    assert said.endswith("fetch http://127.0.0.1:9/~kriz/cifar-100-binary.tar.gz and put it there")
    assert "\n" not in said
    assert leftovers(kept) == []


def test_a_disk_that_is_too_small_is_said_before_the_download(published, kept, monkeypatch):
    name, archive, content = published
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with Site(content) as site:
        monkeypatch.setattr(cifar, "SITE", site.url)
        with pytest.raises(OSError, match=rf"{archive} needs 0\.\d MB of disk, 0\.0 MB are free"):
            load_data(name)
    assert leftovers(kept) == []


def test_what_is_kept_is_used_in_any_form(kept, form, kind):
    files, truth = content_of(form)
    kept.mkdir()
    if kind == "folder":
        written(kept, form, files, kind).rename(kept / form.folder)
        assert load_data(form.of).test.labels.tolist() == truth[form.test][1]
    else:
        packed(kept / form.archive, form, files)
        with pytest.raises(ValueError, match=f"{form.archive}: has the checksum"):
            load_data(form.of)


def test_where_archives_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("QUINCUNX_DATA", "~/there")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.data_folder() == tmp_path / "there"
    monkeypatch.delenv("QUINCUNX_DATA")
    assert download.data_folder() == tmp_path / ".cache" / "quincunx"
