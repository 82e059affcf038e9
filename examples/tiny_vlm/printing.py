"""Text → an image of printed text, 128 × 32, as scanners, screens and tired printers make it.

Everything is drawn from the fonts that matplotlib ships, so nothing is downloaded, and every choice comes from the
generator that is passed in, so that an image is a function of its seed.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT = 128, 32
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
_SMALLEST = 11  # points; below it letters are no longer told apart in 32 rows


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _set_text(text: str, rng: random.Random, ink: int, paper: int) -> Image.Image:
    """Set the characters side by side, at a random place, with random spacing and weight."""
    name, size, spacing = rng.choice(FONTS), rng.randint(16, 27), rng.uniform(-0.5, 4.0)
    stroke = int(rng.random() < 0.25)
    while True:
        font = _font(name, size)
        advances = [font.getlength(character) + spacing + stroke for character in text]
        total = sum(advances)
        if total <= WIDTH - 4 or size == _SMALLEST:
            break
        size = max(_SMALLEST, min(size - 1, int(size * (WIDTH - 4) / total)))
        spacing = min(spacing, 0.5)
    if size < 18:
        stroke = 0  # it would fill the eyes of small letters
    image = Image.new("L", (WIDTH, HEIGHT), paper)
    draw = ImageDraw.Draw(image)
    x = rng.uniform(1.0, max(1.0, WIDTH - total - 1.0))
    y = (HEIGHT - 1.24 * size) / 2 + rng.uniform(-3.0, 3.0)
    for character, advance in zip(text, advances, strict=True):
        draw.text((x, y + rng.uniform(-1.0, 1.0)), character, font=font, fill=ink, stroke_width=stroke)
        x += advance
    return image


def _tilt(image: Image.Image, rng: random.Random, paper: int) -> Image.Image:
    """Rotate by up to 3 degrees and slant by up to 12, about the middle."""
    turn, slant = rng.uniform(-0.05, 0.05), rng.uniform(-0.2, 0.2)
    middle_x, middle_y = WIDTH / 2, HEIGHT / 2
    rows = (1.0, slant - turn, -(slant - turn) * middle_y, turn, 1.0, -turn * middle_x)
    return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR, fillcolor=paper)


def _coarsen(image: Image.Image, rng: random.Random) -> Image.Image:
    """Lose detail: sample at 1/1.3 to 1/2.6 of the resolution and enlarge again."""
    factor = rng.uniform(1.3, 2.6)
    small = image.resize((round(WIDTH / factor), round(HEIGHT / factor)), Image.Resampling.BOX)
    return small.resize((WIDTH, HEIGHT), rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)))


def print_text(text: str, rng: random.Random, *, clean: bool = False) -> Image.Image:
    """Print a string of up to nine characters on an image.

    Args:
        text: what to print.
        rng: where every choice comes from; the image depends on its state and the arguments alone.
        clean: leave out the tilt, the lost detail, the blur and the noise.

    Returns:
        A grey image (mode ``L``), `WIDTH` × `HEIGHT` pixels.
    """
    ink, paper = rng.randint(0, 100), rng.randint(190, 255)
    if rng.random() < 0.15:
        ink, paper = paper, ink
    image = _set_text(text, rng, ink, paper)
    if clean:
        return image
    if rng.random() < 0.3:
        image = _tilt(image, rng, paper)
    damage = rng.random()
    if damage < 0.3:
        image = _coarsen(image, rng)
    elif damage < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    if rng.random() < 0.4:
        noise = np.random.Generator(np.random.PCG64(rng.getrandbits(32))).normal(
            0.0, rng.uniform(2, 14), (HEIGHT, WIDTH)
        )
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image
