"""Image files, crops, the shapes data set and the order of training images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import encoder as encoders


def write(path, size=(5, 4), color=(200, 30, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_labels_follow_the_first_level_folders(tmp_path):
    names = ["b/2.png", "b/1.JPEG", "b/deep/er/0.webp", "a/x/y.png", "c/z.bmp"]
    for name in [*names, "b/.hidden.png", "a/.cache/no.png", ".git/no.png", "b/._1.jpg"]:
        write(tmp_path / name)
    for name in ("synsets.txt", "a/readme.md", "b/paper.pdf", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    paths, labels, classes = encoders.find_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        "a/x/y.png", "b/1.JPEG", "b/2.png", "b/deep/er/0.webp", "c/z.bmp"
    ]  # fmt: skip
    assert labels == [0, 1, 1, 1, 2] and classes == ["a", "b", "c"]
    source = encoders.ImageFolder(tmp_path)
    assert len(source) == 5 and source.classes == classes
    image, label = source.open(3)
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 1)


def test_flat_folder_is_one_class(tmp_path, monkeypatch):
    for name in ("photos/2.png", "photos/10.png", "photos/.hidden.png", "photos/.thumbs/1.png"):
        write(tmp_path / name)
    paths, labels, classes = encoders.find_images(tmp_path / "photos")
    assert [os.path.basename(path) for path in paths] == ["10.png", "2.png"]
    assert labels == [0, 0] and classes == ["photos"]
    monkeypatch.chdir(tmp_path / "photos")
    assert encoders.find_images(".")[2] == ["photos"]


def test_train_and_val_inside_mean_train(tmp_path):
    write(tmp_path / "train" / "a" / "1.png")
    write(tmp_path / "train" / "b" / "1.png")
    assert encoders.find_images(tmp_path)[2] == ["train"]  # without val/ a folder like any other
    write(tmp_path / "val" / "2.png")
    paths, _, classes = encoders.find_images(tmp_path)
    assert classes == ["a", "b"] and [os.path.basename(path) for path in paths] == ["1.png", "1.png"]
    assert len(encoders.find_images(tmp_path / "val")[0]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Files of every kind


def saved(path, image, **options):
    image.save(path, **options)
    return encoders.open_image(path)


def test_every_mode_becomes_rgb(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    color = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_90), Image.new("L", (16, 16), 40)))
    grey_rgb = np.asarray(grey)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(saved(tmp_path / "grey.png", grey), grey_rgb)
    np.testing.assert_array_equal(saved(tmp_path / "rgb.png", color), color)
    np.testing.assert_array_equal(
        saved(tmp_path / "bit.png", grey.convert("1")), np.asarray(grey.convert("1").convert("RGB"))
    )
    np.testing.assert_array_equal(saved(tmp_path / "cmyk.tif", color.convert("CMYK")), color)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(saved(tmp_path / "palette.png", palette), palette.convert("RGB"))

    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)  # PNG's own way from 8 to 16 bits
    np.testing.assert_array_equal(saved(tmp_path / "16.png", sixteen), grey_rgb)
    np.testing.assert_array_equal(saved(tmp_path / "16.tif", sixteen), grey_rgb)
    assert np.asarray(saved(tmp_path / "16.png", Image.fromarray(np.full((2, 2), 65535, np.uint16)))).min() == 255


def test_transparency_lies_on_white(tmp_path):
    alpha = np.tile(np.array([0, 51, 255], np.uint8), (2, 1))
    ink = np.full((2, 3), 100, np.uint8)
    expected = np.array([255, 100 * 0.2 + 255 * 0.8, 100]).round()
    rgba = Image.fromarray(np.stack([ink, ink, ink, alpha], 2))
    for name, image in {"rgba.png": rgba, "la.png": Image.fromarray(np.stack([ink, alpha], 2))}.items():
        result = np.asarray(saved(tmp_path / name, image)).astype(float)
        assert result.shape == (2, 3, 3)
        np.testing.assert_allclose(result, np.broadcast_to(expected[:, None], (2, 3, 3)), atol=1, err_msg=name)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    result = np.asarray(saved(tmp_path / "p.png", palette, transparency=0))
    np.testing.assert_array_equal(result, [[[255, 255, 255], [200, 100, 50]]])
    key = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    np.testing.assert_array_equal(
        saved(tmp_path / "key.png", key, transparency=(9, 9, 9)), [[[255, 255, 255], [1, 2, 3]]]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8))
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # the stored image, by its tag
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(saved(tmp_path / "photo.png", stored, exif=exif), upright)


# ---------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize("size", [(37, 101), (101, 37), (24, 24), (9, 200), (200, 200)])
def test_random_crop_is_a_window_of_the_resized_image(size):
    image = Image.effect_noise(size, 90).convert("RGB")
    scale = 24 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    assert min(resized.size) == 24
    places = {
        (left, top): resized.crop((left, top, left + 16, top + 16)).tobytes()
        for left in range(resized.width - 15)
        for top in range(resized.height - 15)
    }
    place = {content: key for key, content in places.items()}
    drawn = [place[encoders.random_crop(image, 24, 16, np.random.default_rng(i)).tobytes()] for i in range(400)]
    for axis, side in enumerate(resized.size):
        found = {key[axis] for key in drawn}
        if side < 40:
            assert found == set(range(side - 15)), "every offset is drawn, both ends too"
        else:
            assert min(found) < 10 and max(found) > side - 26


def test_crops_of_the_diffusion_model(tmp_path):
    image = Image.effect_noise((40, 70), 90).convert("RGB")
    plain = encoders.center_crop(image, 16)
    drawn = [encoders.center_crop_flip(image, 16, np.random.default_rng(i)).tobytes() for i in range(200)]
    mirrored = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(drawn) == {plain.tobytes(), mirrored}
    assert 70 < drawn.count(mirrored) < 130


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def test_shapes_are_a_function_of_seed_and_index():
    first, again, other = encoders.Shapes(40, 32), encoders.Shapes(30, 32), encoders.Shapes(40, 32, seed=1)
    again.open(25)  # the order of opening does not matter
    for i in range(30):
        (a, label), (b, _), (c, _) = first.open(i), again.open(i), other.open(i)
        assert a.tobytes() == b.tobytes() and a.tobytes() != c.tobytes()
        assert (a.mode, a.size, label) == ("RGB", (32, 32), i % len(first.classes))
    assert len({first.open(i)[0].tobytes() for i in range(40)}) == 40
    assert len(first) == 40 and len(first.classes) == 10


def test_shapes_are_bright_on_dark_and_differ_in_form():
    masks = []
    for label in range(10):
        images = np.stack([np.asarray(encoders.Shapes(100, 32).draw(label + 10 * i)[0]).max(2) for i in range(10)])
        masks.append((images > 120).mean(0))
        assert (images[:, :2, :2] <= 76).all() and (images > 150).any((1, 2)).all()
    distances = [np.abs(a - b).mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert min(distances) > 0.02


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def batches(steps, batch=6, micro_batch=3, seed=0, world_size=1, count=20):
    """What each step sees, all ranks and micro-batches in order."""
    local = batch // world_size
    per_step = {step: [] for step in steps}
    for rank in range(world_size):
        parts = list(encoders.training_batches(count, batch, micro_batch, steps, seed, rank, world_size))
        assert all(len(part) <= micro_batch for part in parts)
        items = [item for part in parts for item in part]
        assert len(items) == local * len(steps)
        for i, step in enumerate(steps):
            per_step[step] += items[i * local : (i + 1) * local]
    return per_step


def test_every_image_once_in_an_epoch():
    stream = [item for items in batches(range(20)).values() for item in items]  # 120 = 6 epochs of 20
    epochs = [stream[i : i + 20] for i in range(0, 120, 20)]
    orders = [[index for index, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6, "each epoch has its own order"
    assert len({key for _, key in stream}) == 120, "and each image its own key in each"
    assert all(0 <= key < 2**63 for _, key in stream)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 1), (1, 6), (2, 3), (3, 2), (2, 2), (6, 1), (1, 4)])
def test_a_step_depends_on_neither_processes_nor_micro_batch(world_size, micro_batch):
    assert batches(range(8), micro_batch=micro_batch, world_size=world_size) == batches(range(8))


def test_training_goes_on_at_any_step():
    whole = batches(range(12))
    for start in (1, 3, 4, 11):
        assert batches(range(start, 12)) == {step: whole[step] for step in range(start, 12)}
    assert batches(range(12), seed=1) != whole


def test_a_batch_may_be_larger_than_the_data_set():
    stream = [item for items in batches(range(25)).values() for item in items]
    large = batches(range(3), batch=50, micro_batch=10)
    assert [item for items in large.values() for item in items] == stream[:150]


def test_a_mistake_in_a_transform_of_shapes_is_not_hidden():
    with pytest.raises(ValueError, match="low >= high|high <= 0"):
        encoders.Images(encoders.Shapes(10, 16), lambda image, rng: encoders.random_crop(image, 8, 16, rng))[0, 0]


def test_loader_processes_draw_the_same_images():
    images = encoders.Images(encoders.Shapes(20, 16), lambda image, rng: encoders.random_crop(image, 24, 16, rng))
    one, two = (
        list(encoders.make_loader(images, encoders.training_batches(20, 6, 3, range(2), 0), workers, "cpu"))
        for workers in (0, 2)
    )
    assert len(one) == 4 and one[0][0].shape == (3, 3, 16, 16) and one[0][0].dtype == torch.uint8
    assert one[0][1].shape == one[0][2].shape == one[0][3].shape == (3,)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    index, key = next(encoders.training_batches(20, 6, 3, range(2), 0))[1]
    assert one[0][2][1] == key and one[0][1][1] == index % 10
    assert ImageChops.difference(
        Image.fromarray(one[0][0][1].numpy().transpose(1, 2, 0)),
        encoders.random_crop(encoders.Shapes(20, 16).draw(index)[0], 24, 16, np.random.default_rng(key)),
    ).getbbox() is None  # fmt: skip


def test_what_data_names(tmp_path):
    shapes = encoders.image_source("shapes", 48)
    assert len(shapes) == 8000 and shapes.open(0)[0].size == (48, 48)
    write(tmp_path / "1.png")
    assert len(encoders.image_source(tmp_path, 48)) == 1
