"""Lesson 00: images in memory, captions measured from the strokes, pictures, and damaged files."""

import gzip
import hashlib
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minildm import data, viz
from minildm.data import DIGIT_NAMES, DataError, StrokeWords, drop_words, seeded, to_float, to_uint8

RAW = data.data_root() / "MNIST" / "raw"


# MNIST


@pytest.mark.parametrize("part, images, labels", [("train", "x_train", "y_train"), ("t10k", "x_test", "y_test")])
def test_mnist_is_the_shipped_bytes_padded_with_black(mnist, part, images, labels):
    pixels = np.frombuffer(gzip.decompress((RAW / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    digits = np.frombuffer(gzip.decompress((RAW / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    padded = np.pad(pixels.reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    assert torch.equal(getattr(mnist, images), torch.from_numpy(padded))
    assert torch.equal(getattr(mnist, labels), torch.tensor(digits).long())


@pytest.fixture
def victim(mnist, tmp_path, monkeypatch):
    """A data folder whose packed test labels can be damaged; the other files are links to the real ones."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.MNIST_SHA256:
        for file in (name, name + ".gz"):
            os.symlink(RAW / file, raw / file)
    packed = raw / "t10k-labels-idx1-ubyte.gz"
    content = packed.read_bytes()
    packed.unlink()
    packed.with_suffix("").unlink()
    packed.write_bytes(content)
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    return packed


def flip(content: bytes, where: int) -> bytes:
    """The content with one byte changed."""
    return content[:where] + bytes([content[where] ^ 255]) + content[where + 1 :]


DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "not gzip": lambda content: flip(content, 0),
    "broken block": lambda content: flip(content, 30),
    "altered in the middle": lambda content: flip(content, len(content) // 2),
    "altered checksum": lambda content: flip(content, len(content) - 6),
    "another file": lambda content: gzip.compress(b"labels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_mnist_is_refused_and_nothing_is_unpacked(victim, damage, refused, tmp_path):
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(DAMAGE[damage](victim.read_bytes()))
    with pytest.raises(DataError, match="restore it with `git checkout") as error:
        data.load_mnist()
    assert str(victim) in str(error.value)
    assert not victim.with_suffix("").exists()
    assert str(error.value) in refused("train", "mnist-text", "--steps", 2, "--out", tmp_path / "run")


def test_mnist_is_unpacked_on_first_use_and_mended_when_the_unpacked_file_was_altered(victim):
    unpacked = victim.with_suffix("")
    for before in (None, b"altered"):
        if before:
            unpacked.write_bytes(before)
        assert len(data.load_mnist().y_test) == 10_000
        assert hashlib.sha256(unpacked.read_bytes()).hexdigest() == data.MNIST_SHA256[unpacked.name]


# npz and CIFAR-10


def arrays(shape=(5, 20, 17, 3), **changes):
    """What load_npz wants, with changes; an array of None is left out."""
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(len(images))
    made = {"x_train": images, "y_train": labels, "x_test": images[:2], "y_test": labels[:2]} | changes
    return {name: array for name, array in made.items() if array is not None}


@given(n=st.integers(1, 4), h=st.integers(1, 40), w=st.integers(1, 40), channels=st.sampled_from([None, 1, 3]))
def test_npz_images_keep_their_pixels_and_reach_a_multiple_of_16(tmp_path_factory, n, h, w, channels):
    path = tmp_path_factory.mktemp("npz") / "own.npz"
    own = arrays((n, h, w) if channels is None else (n, h, w, channels))
    np.savez(path, **own)
    loaded = data.load_npz(path)
    size = [-(-side // 16) * 16 for side in (h, w)]
    assert loaded.x_train.shape == (n, channels or 1, *size)
    assert loaded.x_train.dtype == torch.uint8 and loaded.y_train.dtype == torch.int64
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    inside = loaded.x_train[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1)
    assert np.array_equal(inside.reshape(own["x_train"].shape), own["x_train"])
    assert loaded.x_train.sum() == own["x_train"].sum()  # the rest is black
    assert loaded.y_train.tolist() == own["y_train"].tolist()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"y_train": None}, "has no y_train: save all of"),
        ({"x_train": None, "x_test": None}, "has no x_train, x_test"),
        ({"x_train": np.zeros((5, 20, 17, 3), np.float32)}, "images must be uint8"),
        ({"x_test": np.zeros((2, 20 * 17), np.uint8)}, "images must be uint8"),
        ({"x_train": np.zeros((5, 20, 17, 4), np.uint8)}, "C = 1 or 3"),
        ({"x_train": np.zeros((5, 3, 20, 17), np.uint8)}, "C = 1 or 3"),
        ({"y_train": np.zeros(4, np.int64)}, "labels must be 5 whole numbers"),
        ({"y_train": np.zeros((5, 1), np.int64)}, "labels must be 5 whole numbers"),
        ({"y_test": np.array(["one", "two"])}, "labels must be 2 whole numbers"),
        ({"y_test": np.array([1.0, 2.0])}, "labels must be 2 whole numbers"),
        ({"y_test": np.array([None, {}], dtype=object)}, "write it again with numpy.savez"),
    ],
)
def test_wrong_npz_arrays_are_refused(tmp_path, changes, says):
    np.savez(tmp_path / "own.npz", **arrays(**changes))
    with pytest.raises(DataError, match=says) as error:
        data.load_npz(tmp_path / "own.npz")
    assert str(tmp_path / "own.npz") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", "truncated", "one array", "folder"])
def test_files_that_are_no_npz_are_refused(tmp_path, content):
    path = tmp_path / "own.npz"
    if content == "folder":
        path.mkdir()
    elif content == "one array":
        np.save(tmp_path / "one.npy", np.zeros(3))
        os.replace(tmp_path / "one.npy", path)
    elif content == "truncated":
        np.savez(path, **arrays())
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match="write it again with numpy.savez"):
        data.load_npz(path)


def test_missing_npz_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist: give the path"):
        data.load_npz(tmp_path / "none.npz")


def test_labels_of_any_whole_number_type_are_read(tmp_path):
    for kind in ("<u1", "<i4", ">i8", "<u8"):
        np.savez(tmp_path / "own.npz", **arrays(y_train=np.arange(5).astype(kind)))
        assert data.load_npz(tmp_path / "own.npz").y_train.tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def cifar_source(tmp_path, monkeypatch):
    """Replaces torchvision's CIFAR10 by what the test gives, and the data folder by an empty one."""
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    return lambda source: monkeypatch.setattr(data.import_torchvision().datasets, "CIFAR10", source)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("not found or corrupted")])
def test_cifar10_without_network_says_what_to_do(cifar_source, tmp_path, error):
    def fail(*args, **kwargs):
        raise error

    cifar_source(fail)
    with pytest.raises(DataError, match="connect to a network once, or put a cifar10.npz there") as refusal:
        data.load_cifar10()
    assert str(tmp_path / "cifar10.npz") in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_cifar10_is_downloaded_once(cifar_source):
    calls = []

    def download(root, train, download):
        calls.append(train)
        return SimpleNamespace(data=np.full((2, 32, 32, 3), 7, np.uint8), targets=[3, 4])

    cifar_source(download)
    for _ in range(2):
        loaded = data.load_cifar10()
        assert loaded.x_test.shape == (2, 3, 32, 32) and loaded.y_train.tolist() == [3, 4]
    assert calls == [True, False]


# pixels, seeds and files


def test_to_float_and_back_is_the_identity_on_every_pixel_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[-1] == 1
    assert torch.equal(to_uint8(floats), pixels)


@given(st.floats(-10, 10))
def test_to_uint8_rounds_to_the_nearest_level_and_clips(value):
    level = to_uint8(torch.tensor(value)).item()
    assert abs(level - min(max((value + 1) * 127.5, 0), 255)) <= 0.5001


@given(h=st.integers(1, 50), w=st.integers(1, 50), multiple=st.integers(1, 20))
def test_padding_is_black_even_and_no_more_than_needed(h, w, multiple):
    padded = data.pad_to_multiple(torch.ones(1, 1, h, w), multiple)[0, 0]
    for size, own, ink in zip(padded.shape, (h, w), (padded.sum(1), padded.sum(0)), strict=True):
        assert size % multiple == 0 and own <= size < own + multiple
        before = ink.nonzero()[0].item()
        assert 0 <= size - own - 2 * before <= 1
    assert padded.sum() == h * w


def test_seeds_are_independent_of_the_global_one():
    first = torch.rand(3, generator=seeded(5))
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(3, generator=seeded(5)))
    assert not torch.equal(first, torch.rand(3, generator=seeded(6)))


@pytest.mark.parametrize("seed", [2**64, -(2**64)])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be"):
        seeded(seed)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "below" / "file"
    data.write_atomically(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    data.write_atomically(tmp_path / "link", lambda file: file.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no ordinary file: choose another place"):
        data.write_atomically(tmp_path / "pipe", lambda file: file.write_text("new"))
    assert not (tmp_path / "pipe").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be copied")
def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        data.write_atomically(path, lambda file: file.write_text("half") and os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert path.read_text() == "old"


def test_the_file_under_its_name_is_never_half_written(tmp_path):
    path, seen = tmp_path / "file", []
    path.write_text("old")

    def write(file):
        file.write_text("half")
        seen.append(path.read_text())
        file.write_text("new")

    data.write_atomically(path, write)
    assert seen == ["old"] and path.read_text() == "new"


# strokes and captions


def bar(width: int, length: int = 20, lean: float = 0.0) -> torch.Tensor:
    """A stroke of ink (1, 1, 64, 64), `length` rows high, moved `lean` pixels to the right with each row up."""
    image = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    for row in range(length):
        left = 30 + round((length / 2 - row) * lean)
        image[0, 0, 10 + row, left : left + width] = 255
    return image


@pytest.mark.parametrize("lean", [-1.0, 0.0, 1.0, 2.0])
def test_slant_is_the_shift_for_each_pixel_of_height(lean):
    _, slant = data.stroke_attributes(bar(3, lean=lean))
    assert slant.item() == pytest.approx(lean, abs=1e-4)


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_thickness_is_the_width_of_a_long_stroke(width):
    thickness, _ = data.stroke_attributes(bar(width, length=50))
    assert thickness.item() == pytest.approx(width, rel=0.17)  # its two ends add to the outline


def test_slant_equals_moments_summed_pixel_by_pixel(mnist):
    for image in mnist.x_train[:5]:
        ink = image[0].double().numpy()
        cells = [(y, x, ink[y, x]) for y in range(32) for x in range(32)]
        area = sum(v for _, _, v in cells)
        cy, cx = sum(y * v for y, _, v in cells) / area, sum(x * v for _, x, v in cells) / area
        mu11 = sum((y - cy) * (x - cx) * v for y, x, v in cells)
        mu02 = sum((y - cy) ** 2 * v for y, _, v in cells)
        assert data.stroke_attributes(image[None])[1].item() == pytest.approx(-mu11 / mu02, abs=1e-4)


def test_mirroring_turns_the_slant_and_moving_keeps_both_attributes(mnist):
    images = mnist.x_test[:50]
    thickness, slant = data.stroke_attributes(images)
    moved = data.stroke_attributes(images.roll((1, -1), (2, 3)))
    torch.testing.assert_close(moved, (thickness, slant), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.stroke_attributes(images.flip(3))[1], -slant, rtol=1e-3, atol=1e-3)


def test_blank_images_have_finite_attributes():
    assert all(torch.isfinite(a).all() for a in data.stroke_attributes(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)))


@pytest.fixture(scope="module")
def words(mnist):
    return StrokeWords.measure(mnist.x_train, mnist.y_train)


def test_strokes_of_many_images_are_those_of_each(mnist):
    images = mnist.x_test[:1100]  # more than two batches
    for whole, parts in zip(
        data.stroke_attributes(images),
        zip(*(data.stroke_attributes(x[None]) for x in images), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(whole, torch.cat(parts))


def test_a_third_of_each_digit_gets_each_word(words, mnist):
    for third in words.thirds(mnist.x_train, mnist.y_train):
        for digit in range(10):
            counts = third[mnist.y_train == digit].bincount(minlength=3) / (mnist.y_train == digit).sum()
            assert (counts - 1 / 3).abs().max() < 0.002


def test_captions_say_the_digit_and_the_outer_thirds(words, mnist):
    images, labels = mnist.x_test[:300], mnist.y_test[:300]
    thickness, slant = data.stroke_attributes(images)
    for i, caption in enumerate(words.captions(images, labels)):
        d = labels[i]
        parts = [DIGIT_NAMES[d]]
        if not words.slant[d, 0] < slant[i] <= words.slant[d, 1]:
            parts.insert(0, "slanted" if slant[i] > words.slant[d, 1] else "upright")
        if not words.thickness[d, 0] < thickness[i] <= words.thickness[d, 1]:
            parts.insert(0, "thick" if thickness[i] > words.thickness[d, 1] else "thin")
        assert caption == " ".join(["an" if parts[0] in ("eight", "upright") else "a", *parts])


CAPTION = "an upright eight"


@given(seed=st.integers(0, 10**6), p_thin=st.floats(0, 1), p_word=st.floats(0, 1), p_all=st.floats(0, 1))
def test_what_is_left_of_a_caption_keeps_its_order(seed, p_thin, p_word, p_all):
    (left,) = drop_words([CAPTION], seeded(seed), p_thin, p_word, p_all)
    remaining = iter(CAPTION.split())
    assert all(word in remaining for word in left.replace("8", "eight").split())


def test_words_are_dropped_as_often_as_asked():
    n, p_thin, p_word, p_all = 20_000, 0.6, 0.3, 0.1
    left = [caption.split() for caption in drop_words([CAPTION] * n, seeded(0), p_thin, p_word, p_all)]
    kept = (1 - p_all) * (1 - p_thin * p_word)
    for word, share in (("an", kept), ("upright", kept), ("eight", kept / 2), ("8", kept / 2)):
        assert sum(word in words for words in left) / n == pytest.approx(share, abs=0.015)
    whole = (1 - p_all) * (1 - p_thin + p_thin * (1 - p_word) ** 3)
    assert sum(len(words) == 3 for words in left) / n == pytest.approx(whole, abs=0.01)
    assert sum(not words for words in left) / n == pytest.approx(p_all + (1 - p_all) * p_thin * p_word**3, abs=0.01)


def test_long_captions_keep_their_last_word():
    seven_words = "a thick thick thick thick upright 7"
    assert drop_words([seven_words], seeded(0), p_word=0, p_all=0) == [seven_words]
    long = " ".join(["thin"] * 20 + ["3"])
    assert drop_words([long, "3", ""], seeded(0), p_thin=1, p_word=0, p_all=0) == [long, "3", ""]
    assert drop_words([], seeded(0)) == []


def test_dropping_nothing_or_everything():
    for nothing in ({"p_thin": 0}, {"p_thin": 1, "p_word": 0}):
        assert set(drop_words([CAPTION] * 50, seeded(0), p_all=0, **nothing)) == {CAPTION, "an upright 8"}
    assert set(drop_words([CAPTION] * 50, seeded(0), p_thin=1, p_word=1, p_all=0)) == {""}
    assert set(drop_words([CAPTION] * 50, seeded(0), p_all=1)) == {""}


# pictures


@given(n=st.integers(1, 13), columns=st.integers(1, 6), gap=st.integers(0, 3), channels=st.sampled_from([1, 3]))
def test_image_grid_puts_every_image_in_its_place_on_white(n, columns, gap, channels):
    images = torch.rand(n, channels, 4, 5, generator=seeded(n)) - 1  # all darker than white
    grid = viz.image_grid(images, columns, gap)
    columns = min(columns, n)
    rows = -(-n // columns)
    assert grid.shape == (channels, rows * (4 + gap) - gap, columns * (5 + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (4 + gap), i % columns * (5 + gap)
        assert torch.equal(grid[:, top : top + 4, left : left + 5], image)
        grid[:, top : top + 4, left : left + 5] = 1
    assert (grid == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_is_read_back_as_it_was_written(tmp_path, channels):
    image = to_float(torch.randint(256, (1, channels, 16, 32), generator=seeded(0), dtype=torch.uint8))
    viz.save_png(image, tmp_path / "picture", zoom=1)
    read = viz.load_png(tmp_path / "picture", 32, channels)
    assert torch.equal(read[:, :, 8:24], image)  # centred
    assert (read[:, :, :8] == -1).all() and (read[:, :, 24:] == -1).all()  # on black


def test_a_picture_that_is_too_large_is_shrunk_to_fit(tmp_path):
    image = torch.ones(1, 1, 32, 16)
    image[:, :, :16] = -1
    viz.save_png(image, tmp_path / "picture.png", zoom=3)
    read = viz.load_png(tmp_path / "picture.png", 32)
    assert torch.allclose(read[0, 0, 19:, 8:24], torch.ones(13, 16), atol=0.02)  # away from the edge that is smoothed
    assert (read[0, 0, :13] == -1).all() and (read[0, 0, :, :7] == -1).all()


def test_zoom_repeats_pixels(tmp_path):
    viz.save_png(torch.tensor([[[[-1.0, 1.0]]]]), tmp_path / "p.png", zoom=2)
    assert np.array(Image.open(tmp_path / "p.png").convert("L")).tolist() == [[0, 0, 255, 255]] * 2


def test_transparent_parts_of_a_picture_are_black(tmp_path):
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:, :16] = (255, 255, 255, 255)
    pixels[:, 16:] = (255, 255, 255, 0)  # white where it is transparent
    Image.fromarray(pixels).save(tmp_path / "p.png")
    assert (viz.load_png(tmp_path / "p.png")[0, 0, 0] == torch.tensor([1.0] * 16 + [-1.0] * 16)).all()


def test_a_picture_of_16_bits_keeps_its_greys(tmp_path):
    levels = np.linspace(0, 65535, 32).astype(np.uint16)
    Image.fromarray(np.tile(levels, (32, 1))).save(tmp_path / "p.png")
    read = viz.load_png(tmp_path / "p.png")[0, 0, 0]
    assert torch.allclose(read, torch.linspace(-1, 1, 32), atol=2 / 255)


def test_a_picture_too_large_to_be_one_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    with pytest.raises(DataError, match="not a picture that can be read"):
        viz.load_png(tmp_path / "p.png")


def test_missing_and_broken_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist: give the path"):
        viz.load_png(tmp_path / "none.png")
    path = tmp_path / "p.png"
    viz.save_png(torch.rand(1, 1, 64, 64), path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:60], whole[: len(whole) // 2], flip(whole, 20), flip(whole, 40)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a picture that can be read: give a PNG"):
            viz.load_png(path)


def test_every_figure_helper_draws_what_it_was_given():
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    _, axes = viz.plt.subplots(1, 2)
    viz.show_images(images, ax=axes[0], title="three")
    assert np.array_equal(axes[0].images[0].get_array(), to_uint8(viz.image_grid(images))[0].numpy())
    viz.plot_curve([1, 2], [3, 4], "step", "loss", ax=axes[1])
    assert axes[1].lines[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    assert (axes[1].get_xlabel(), axes[1].get_ylabel(), axes[0].get_title()) == ("step", "loss", "three")
    viz.show_rows({"a": images, "b": images})
    assert [ax.get_ylabel() for ax in viz.plt.gcf().axes] == ["a", "b"]
    viz.plt.close("all")
