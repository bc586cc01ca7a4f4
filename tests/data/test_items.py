"""Pairs of images, masks, images made worse on the fly, data sets of the user's own."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from quincunx.data import batches, degraded, greyed, load_data, load_function, load_pairs
from quincunx.data.items import Items, Pictures, item_batches
from quincunx.measure import tasks
from quincunx.measure.tasks import read_pair
from quincunx.train.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(size=(12, 10), seed=0, colours=3):
    shape = (*size, colours) if colours else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def in_folders(root, count=4, first="input", second="target", masks=False):
    for part in ("train", "test"):
        for i in range(count):
            write(root / part / first / f"{i}.png", drawn(seed=i))
            mask = drawn(seed=50 + i, colours=0) % 3 if masks else drawn(seed=50 + i)
            write(root / part / second / f"{i}.png", mask)
    return root


def test_pairs_are_read_by_folder_and_by_name(tmp_path):
    data = load_pairs(in_folders(tmp_path / "folders"))
    assert (len(data.train), len(data.test), data.size, data.in_channels) == (4, 4, (12, 10), 3)
    [(x, y)] = list(batches(data.test, data, 10))
    for i in range(4):
        assert torch.equal((x[i] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(drawn(seed=i)))
        wanted = torch.from_numpy(drawn(seed=50 + i))
        assert torch.equal((y[i] * 255).round().byte().permute(1, 2, 0), wanted)
    for i in range(20):
        write(tmp_path / "names" / f"{i}_low.png", drawn(seed=i))
        write(tmp_path / "names" / f"{i}_high.png", drawn(seed=50 + i))
    named = load_pairs(tmp_path / "names", holdout=0.25)
    assert (len(named.train), len(named.test)) == (15, 5)
    assert named.notes == ("5 of 20 pairs were held out for the test",)


def test_masks_are_class_numbers_and_move_with_their_images(tmp_path):
    root = in_folders(tmp_path, first="images", second="masks", masks=True)
    data = load_pairs(root, masks=True, patch=6)
    assert data.classes == ("0", "1", "2")
    [(_, y)] = list(batches(data.test, data, 10))
    assert y.dtype == torch.int64
    assert torch.equal(y[2], torch.from_numpy(drawn(seed=52, colours=0) % 3).long())
    (root / "classes.txt").write_text("sky\nwall\nfloor\n")
    assert load_pairs(root, masks=True).classes == ("sky", "wall", "floor")
    (root / "classes.txt").write_text("sky\nwall\n")
    with pytest.raises(ValueError, match=r"class 2 occurs, but classes\.txt names 2, 0 to 1"):
        load_pairs(root, masks=True)


def test_a_patch_cuts_turns_and_mirrors_both_alike():
    image = torch.arange(20 * 20 * 3).remainder(251).byte().view(1, 20, 20, 3)
    pictures = Pictures(image, 255 - image, patch=7)
    seen = set()
    for key in range(30):
        x, y = pictures.batch([0], key)
        assert x.shape == y.shape == (1, 3, 7, 7)
        torch.testing.assert_close(x, 1 - y)
        seen.add(tuple((x * 255).round().int().flatten().tolist()))
    assert len(seen) > 25


def test_noise_is_fixed_in_an_evaluation_and_anew_in_training():
    data = degraded(load_data("digits"), noise=25, seed=3)
    one, two = (next(batches(data.test, data, 64)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    deviation = float((one[0] - one[1]).std())
    assert deviation == pytest.approx(25 / 255, rel=0.02)
    # whichever batch an image is in
    alone = list(batches(data.test, data, 1))[5][0]
    assert torch.equal(alone[0], one[0][5])

    def first(seed, augment):
        made = torch.Generator().manual_seed(seed)
        return next(batches(data.train, data, 8, generator=made, augment=augment))[0]

    assert torch.equal(first(1, "patches"), first(1, "patches"))
    assert not torch.equal(first(1, "patches"), first(2, "patches"))
    other = degraded(load_data("digits"), noise=25, seed=4)
    assert not torch.equal(next(batches(other.test, other, 64))[0], one[0])


def test_scaled_down_inputs_have_the_size_of_their_targets():
    data = degraded(load_data("digits"), downscale=2)
    x, y = next(batches(data.test, data, 16))
    assert x.shape == y.shape
    # a factor of 2 in both directions is lost, and nothing is moved
    assert 1e-4 < float((x - y).square().mean()) < 0.01


def test_workers_and_shares_give_the_same_items():
    data = degraded(load_data("digits"), noise=25, patch=16)

    def read(**options):
        made = torch.Generator().manual_seed(1)
        more = {"generator": made, "augment": "patches", **options}
        return [x for x, _ in batches(data.train, data, 500, **more)]

    whole = read()
    for ours, other in zip(whole, read(workers=2), strict=True):
        assert torch.equal(ours, other)
    halves = [read(rank=rank, world=2) for rank in (0, 1)]
    for ours, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))


class Own(Dataset):
    classes = ("a", "b")

    def __init__(self, count=12, wrong=None):
        self.count, self.wrong = count, wrong

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.wrong:
            raise OSError(f"no picture {index}")
        return {"image": torch.full((3, 8, 8), float(index)) + torch.rand(1), "label": index % 2}


def test_a_data_set_of_a_function():
    data = load_function("mine:make", lambda: (Own(), Own(4)), read_pair)
    assert (len(data.train), len(data.test), data.classes) == (12, 4, ("a", "b"))
    x, y = next(batches(data.test, data, 4))
    assert x.shape == (4, 3, 8, 8)
    assert y.tolist() == [0, 1, 0, 1]
    before = torch.random.get_rng_state()
    assert torch.equal(x, next(batches(data.test, data, 4))[0])
    assert torch.equal(before, torch.random.get_rng_state())
    held = load_function("mine:make", Own, read_pair)
    assert (len(held.train), len(held.test)) == (11, 1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: 3, "data='mine:make': returned a int, expected .train, test. of data sets"),
        (lambda: {"test": Own()}, "its training part has no items"),
        (lambda: (Own(wrong=0), Own()), "mine:make: item 0 raises OSError: no picture 0"),
        (lambda: [torch.zeros(3, 4, 4)] * 3, "its training part has no items|returned"),
    ],
)
def test_data_sets_of_another_kind_are_refused(make, match):
    if make() == 3 or isinstance(make(), (dict, tuple)):
        with pytest.raises(ValueError, match=match):
            load_function("mine:make", make, read_pair)
    else:
        # a list is a data set, too; its items have no targets
        assert not load_function("mine:make", make, read_pair).labelled


def test_an_item_that_fails_later_is_named():
    data = load_function("mine:make", lambda: (Own(wrong=7), Own()), read_pair)
    with pytest.raises(ValueError, match="mine:make: item 7 raises OSError: no picture 7"):
        list(batches(data.train, data, 4))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda root: (root / "train/target/0.png").unlink(), r"0\.png: has no target of the same name"),
        (
            lambda root: write(root / "train/target/0.png", drawn((9, 10))),
            "a target of 9 x 10 pixels, but the",
        ),
        (
            lambda root: write(root / "train/input/0.bmp", drawn()),
            r"0\.\w+ is another file for the same pair",
        ),
        (lambda root: (root / "train/input/0.png").write_bytes(b"nothing"), "not a readable image"),
    ],
)
def test_pairs_that_do_not_fit_are_named(tmp_path, change, match):
    root = in_folders(tmp_path)
    change(root)
    with pytest.raises(ValueError, match=match):
        load_pairs(root)


def test_masks_that_are_none_are_named(tmp_path):
    root = in_folders(tmp_path, first="image", second="mask", masks=True)
    write(root / "train/mask/1.png", drawn())
    with pytest.raises(
        ValueError, match=r"1\.png: a mask of mode RGB, expected one channel of class numbers"
    ):
        load_pairs(root, masks=True)
    write(root / "train/mask/1.png", drawn((9, 10), colours=0) % 3)
    with pytest.raises(
        ValueError, match=r"1\.png: a mask of 9 x 10 pixels, but the image 1\.png has 12 x 10"
    ):
        load_pairs(root, masks=True)


def test_values_out_of_range_are_refused(tmp_path):
    digits = load_data("digits")
    for options, match in (
        ({"noise": -1}, "noise=-1: expected a standard deviation from 0 up"),
        ({"downscale": 0}, "downscale=0: expected a whole factor from 1 to 32"),
        ({}, "nothing makes the inputs worse"),
        ({"noise": 25, "patch": 33}, "patch=33: expected 1 to 32"),
    ):
        with pytest.raises(ValueError, match=match):
            degraded(digits, **options)
    with pytest.raises(ValueError, match="no pairs of images, expected input/NAME"):
        load_pairs(tmp_path)
    with pytest.raises(ValueError, match="augment='patches': only images with targets"):
        batches(digits.train, digits, 4, augment="patches")


def test_workers_leave_the_signal_of_dead_children_alone():
    part = Items(Pictures(torch.zeros(3, 8, 8, 3, dtype=torch.uint8)), (8, 8), 3)
    before = signal.getsignal(signal.SIGCHLD)
    assert len(list(item_batches(part, [[0], [1, 2]], None, 1))) == 2
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize(("high", "said"), [(255, "hold 0 and 255, which means no class"), (0, "hold 0")])
def test_masks_of_one_class_are_refused(tmp_path, high, said):
    for i in range(4):
        write(tmp_path / "images" / f"{i}.png", drawn(seed=i))
        write(tmp_path / "masks" / f"{i}.png", (drawn(seed=i, colours=0) > 100).astype(np.uint8) * high)
    with pytest.raises(ValueError, match=f"the masks {said}, so there is one class only"):
        load_pairs(tmp_path, masks=True)
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    assert load_pairs(tmp_path, masks=True).classes == ("ground", "sky")


def test_images_of_floating_point_are_refused(tmp_path):
    for i in range(4):
        for folder in ("input", "target"):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = np.random.default_rng(i).random((8, 8), dtype=np.float32)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.tif")
    with pytest.raises(ValueError, match=r"0\.tif: not a readable image \(floating point values, expected 8"):
        load_pairs(tmp_path)


def test_inputs_in_double_precision_are_what_networks_take():
    items = [(np.full((3, 4, 4), i / 7), i) for i in range(5)]
    data = load_function("own", lambda: (items, items), read_pair, classes=5)
    [(x, y)] = list(batches(data.test, data, 5))
    assert x.dtype == torch.float32
    assert x[:, 0, 0, 0].tolist() == pytest.approx([i / 7 for i in range(5)])
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_an_image_without_a_class_is_not_judged():
    class Means(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    items = [(torch.ones(3, 4, 4), label) for label in (0, 1, -100, 0)]
    data = load_function("own", lambda: (items, items), read_pair, classes=2)
    with pytest.raises(ValueError, match="own: an image with the label -100, no class, cannot be judged"):
        evaluate(Means(), data.test, data)
    known = load_function("own", lambda: (items, items[:2]), read_pair, classes=2)
    assert evaluate(Means(), known.test, known).score == 0.5


def test_grey_images_are_pillows(tmp_path):
    def grey(pixels):
        return torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy())

    pairs = greyed(load_pairs(in_folders(tmp_path / "pairs")))
    masks = greyed(load_pairs(in_folders(tmp_path / "masked", masks=True), masks=True))
    for data in (pairs, masks):
        assert data.in_channels == data.train.channels == data.test.channels == len(data.mean) == 1
        [(x, y)] = list(batches(data.test, data, 10))
        seen = (x * data.std[0] + data.mean[0]) * 255
        for i in range(4):
            torch.testing.assert_close(seen[i, 0], grey(drawn(seed=i)).float(), rtol=0, atol=1e-3)
    assert y.shape == (4, 12, 10), "masks stay"
    [(_, y)] = list(batches(pairs.test, pairs, 10))
    torch.testing.assert_close(y[1, 0] * 255, grey(drawn(seed=51)).float(), rtol=0, atol=1e-3)
    assert (pairs.mean, pairs.std) == ((0.0,), (1.0,))
    assert greyed(pairs) is pairs
    assert degraded(greyed(load_data(tmp_path / "pairs", labelled=False)), noise=25).in_channels == 1
    assert pairs.train.facts != load_pairs(tmp_path / "pairs").train.facts


def test_what_cannot_be_made_grey(tmp_path):
    own = load_function("own", lambda: [(torch.ones(3, 4, 4), 0)] * 5, read_pair)
    with pytest.raises(ValueError, match="grey: own says itself how many channels"):
        greyed(own)
    for i in range(4):
        write(tmp_path / "a" / f"{i}.png", drawn((300, 300), seed=i))
    with pytest.raises(ValueError, match="is streamed; --in-memory"):
        greyed(load_data(tmp_path, stream=True, labelled=False))
    two = load_function("own", lambda: [(torch.ones(2, 4, 4), 0)] * 5, read_pair)
    with pytest.raises(ValueError, match="have 2 channels, expected 1 or 3"):
        greyed(two)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("images/{}.png", "masks/{}_mask.png"),
        ("images/{}_image.png", "masks/{}.png"),
        ("{}.png", "{}_mask.png"),
        ("a/{}.png", "a/{}_gt.png"),
        ("JPEGImages/{}.png", "SegmentationClass/{}.png"),
        ("train/img/{}.png", "train/annotations/{}.png"),
    ],
)
def test_other_names_of_the_two_sides(tmp_path, first, second):
    for i in range(6):
        write(tmp_path / first.format(i), drawn(seed=i))
        write(tmp_path / second.format(i), drawn(seed=i, colours=0) % 3)
    write(tmp_path / "cover.png", drawn(seed=9))
    data = load_pairs(tmp_path, masks=True)
    assert len(data.train) + len(data.test) == 6
    [(x, y)] = list(batches(data.test, data, 10))
    seen = (
        (x * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]) * 255
    ).round()
    for image, mask in zip(seen, y, strict=True):
        # the grey image of the same seed as its mask
        seed = next(
            i for i in range(6) if torch.equal(image.byte().permute(1, 2, 0), torch.from_numpy(drawn(seed=i)))
        )
        assert torch.equal(mask, torch.from_numpy(drawn(seed=seed, colours=0) % 3).long())


def test_gradients_are_on_after_a_task_was_refused():
    net = torch.nn.Conv2d(3, 3, 1)
    data = load_function("own", lambda: [(torch.ones(3, 4, 4), 0)] * 8, read_pair)
    task = tasks.agreement(lambda output, original: (output - original).mean())
    held = []
    try:
        evaluate(net, data.test, data, task=task, original=net)
    except ValueError as error:
        # what is held by the trace ends later
        held.append(error)
    assert held
    held.clear()
    assert torch.is_grad_enabled()
    net(torch.ones(1, 3, 4, 4)).sum().backward()
