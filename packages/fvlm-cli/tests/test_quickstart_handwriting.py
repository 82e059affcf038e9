from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fvlm_cli.quickstart.handwriting import HEIGHT, WIDTH, split, writings
from fvlm_core.errors import ConfigError


def test_train_and_test_share_no_scan_and_use_all():
    train, test = split()
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(range(1797))
    drawn = {name: {s for w in writings(2000, 3, test=name) for s in w.scans} for name in (False, True)}
    assert drawn[False] <= set(train)
    assert drawn[True] <= set(test)
    # no test scan is a copy of a training scan either
    images = load_digits().images
    copies = {images[i].tobytes() for i in train} & {images[i].tobytes() for i in test}
    assert not copies


def test_text_is_what_the_scans_are():
    digits = load_digits().target
    for writing in writings(200, 0, test=True):
        assert writing.text == "".join(str(digits[scan]) for scan in writing.scans)
        assert 3 <= len(writing.text) <= 5


def test_every_digit_is_on_the_image():
    images = load_digits().images
    for writing in writings(100, 1, test=True):
        pixels = np.asarray(writing.image)
        assert pixels.shape == (HEIGHT, WIDTH)
        assert pixels.dtype == np.uint8
        drawn = (255 - pixels.astype(float)).sum() / 255
        # a scan's ink, 0 to 16 a pixel, enlarged to between 22 and 24 pixels a side; neighbours overlap by 2 at most
        inked = sum(images[scan].sum() / 16 for scan in writing.scans) / 64
        assert 0.85 * 22**2 * inked < drawn < 1.15 * 24**2 * inked


def test_training_digits_are_varied_and_stay_what_they_are():
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    train, _ = split()
    right = 0
    for writing in writings(100, 2, test=False):
        assert writing.text == "".join(str(digits[scan]) for scan in writing.scans)
        pixels = 255 - np.asarray(writing.image).astype(float)
        inked = sum(images[scan].sum() / 16 for scan in writing.scans) / 64
        assert 0.6 * 22**2 * inked < pixels.sum() / 255 < 1.45 * 24**2 * inked
        # the first digit's place, shrunk to a scan's size, is still nearest to a scan of the same digit
        left = int(np.argmax(pixels.max(axis=0) > 60))
        rows = np.flatnonzero(pixels[:, left : left + 16].max(axis=1) > 60)
        crop = Image.fromarray(pixels[rows[0] : rows[-1] + 1, left : left + 16].astype(np.uint8))
        shrunk = np.asarray(crop.resize((6, 8), Image.Resampling.BOX)).astype(float) / 16
        distance = ((images[train][:, :, 1:7] - shrunk) ** 2).sum(axis=(1, 2))
        right += digits[train][distance.argmin()] == int(writing.text[0])
    assert right >= 60


def test_a_seed_gives_the_same_strings_and_another_others():
    first, again, other = (writings(20, seed, test=True) for seed in (5, 5, 6))
    assert [w.text for w in first] == [w.text for w in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [w.text for w in first] != [w.text for w in other]


def test_no_strings_are_refused():
    with pytest.raises(ConfigError, match="count=0 "):
        writings(0, 0, test=True)
