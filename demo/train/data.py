"""The pictures: flat emoji on plain grounds, their augmentations, and three drawn styles.

What it is: a deterministic data set made from the SVG bodies of `@iconify-json/fluent-emoji-flat`
(MIT, Microsoft Corporation). What it is not: a downloader; `train.py --icons` names the file.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

SIZE = 32
"""Edge of a training picture in pixels."""

DETAIL = 128
"""Edge at which augmentation and styles are drawn before they shrink to SIZE."""

SUBJECTS: dict[str, str] = {
    "apple": "red-apple", "banana": "banana", "strawberry": "strawberry", "pizza": "pizza",
    "burger": "hamburger", "doughnut": "doughnut", "sunflower": "sunflower", "tree": "deciduous-tree",
    "cactus": "cactus", "mushroom": "mushroom", "cat": "cat-face", "dog": "dog-face",
    "panda": "panda", "pig": "pig-face", "frog": "frog", "fox": "fox",
    "owl": "owl", "penguin": "penguin", "fish": "tropical-fish", "butterfly": "butterfly",
    "ladybird": "lady-beetle", "sun": "sun", "moon": "crescent-moon", "star": "star",
    "heart": "red-heart", "house": "house", "car": "automobile", "rocket": "rocket",
    "balloon": "balloon", "umbrella": "umbrella", "snowman": "snowman", "ghost": "ghost",
}  # fmt: skip
"""Prompt word -> icon name in the package."""

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 248),
    "sky": (150, 205, 245),
    "mint": (165, 228, 190),
    "rose": (248, 180, 190),
    "sand": (238, 214, 160),
    "night": (38, 40, 84),
}
"""Prompt word -> sRGB ground colour."""

STYLES = ("ink", "neon", "terracotta")

INK_PAPER, INK_LINE = np.array([0.97, 0.95, 0.90]), np.array([0.06, 0.06, 0.10])
TERRACOTTA = np.array([[30, 10, 12], [120, 38, 20], [205, 98, 48], [240, 190, 130], [255, 240, 214]]) / 255


def rasterise(icons: Path) -> dict[str, Image.Image]:
    """Prompt word -> RGBA picture, 2 * DETAIL on edge."""
    source = json.loads(icons.read_text())["icons"]
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="256" height="256">{}</svg>'

    def one(name: str) -> Image.Image:
        png = resvg_py.svg_to_bytes(svg_string=frame.format(source[name]["body"]))
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((2 * DETAIL, 2 * DETAIL))

    return {word: one(name) for word, name in SUBJECTS.items()}


def place(icon: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A small random flip, turn, scale and shift; DETAIL on edge, premultiplied alpha."""
    scale = rng.uniform(0.86, 1.0) * (-1 if rng.random() < 0.5 else 1)
    turn = math.radians(rng.uniform(-6, 6))
    dx, dy = rng.uniform(-0.05, 0.05, 2) * DETAIL
    edge, half = icon.width, DETAIL / 2
    zoom = edge / DETAIL / abs(scale)
    a, b = math.cos(turn) * zoom, math.sin(turn) * zoom
    flip = -1 if scale < 0 else 1
    # PIL maps each output pixel back to the source: rows of (x, y, 1) coefficients.
    matrix = (
        flip * a, flip * b, edge / 2 - flip * (a * (half + dx) + b * (half + dy)),
        -b, a, edge / 2 + b * (half + dx) - a * (half + dy),
    )  # fmt: skip
    premultiplied = icon.convert("RGBa")
    return premultiplied.transform((DETAIL, DETAIL), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def shrink(pixels: np.ndarray) -> np.ndarray:
    """[DETAIL, DETAIL, C] -> [SIZE, SIZE, C] by area."""
    factor = DETAIL // SIZE
    return pixels.reshape(SIZE, factor, SIZE, factor, -1).mean((1, 3))


def blur(plane: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of [H, W] in 0..1."""
    picture = Image.fromarray((plane.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def edges(rgba: np.ndarray) -> np.ndarray:
    """Strength 0..1 of colour and outline steps in a premultiplied [H, W, 4]."""
    total = np.zeros(rgba.shape[:2], dtype=np.float32)
    for channel, gain in ((0, 1.0), (1, 1.0), (2, 1.0), (3, 1.6)):
        plane = blur(rgba[..., channel], 1.0)
        down, right = np.gradient(plane)
        total = np.maximum(total, gain * np.hypot(down, right))
    return (total * 7 - 0.25).clip(0, 1)


def ink(rgba: np.ndarray) -> np.ndarray:
    """Brush outline with a little hatching in the darks, on paper."""
    line = (blur(edges(rgba), 2.0) * 2.4).clip(0, 1)
    dark = rgba[..., 3] * (0.42 - rgba[..., :3] @ [0.3, 0.59, 0.11]).clip(0, 1) * 2.0
    line = np.maximum(line, dark.clip(0, 1))[..., None]
    return INK_PAPER * (1 - line) + INK_LINE * line


def neon(rgba: np.ndarray) -> np.ndarray:
    """Glowing outline in the picture's own hue, on near-black."""
    line = (blur(edges(rgba), 1.5) * 2.0).clip(0, 1)
    colour = np.stack([blur(rgba[..., c], 5.0) for c in range(3)], axis=-1)
    hue = colour - 0.75 * colour.min(-1, keepdims=True)
    hue = hue / (hue.max(-1, keepdims=True) + 1e-3)
    lit = hue * line[..., None]
    glow = np.stack([blur(lit[..., c], 7.0) for c in range(3)], axis=-1)
    core = (line[..., None] - 0.75).clip(0, 1) * 1.6
    return (np.array([0.02, 0.01, 0.06]) + lit + 1.1 * glow + core).clip(0, 1)


def terracotta(rgb: np.ndarray, line: np.ndarray) -> np.ndarray:
    """A finished [H, W, 3] picture in five fired-clay tones, with `line` [H, W] as dark joints."""
    level = (rgb @ [0.25, 0.4, 0.35] - 0.55 * line).clip(0, 1)
    stops = np.linspace(0, 1, len(TERRACOTTA))
    return np.stack([np.interp(level, stops, TERRACOTTA[:, c]) for c in range(3)], axis=-1)


@dataclass(frozen=True)
class Bank:
    """Pictures in [-1, 1], NCHW float32, for every style: [subject * copies * ground]."""

    base: np.ndarray
    styled: dict[str, np.ndarray]
    subject: np.ndarray
    ground: np.ndarray


def build(icons: Path, copies: int, seed: int) -> Bank:
    """`copies` augmentations of each subject, each on every ground."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("base", *STYLES)}
    subject: list[int] = []
    ground: list[int] = []
    drawn: dict[str, Callable[[np.ndarray], np.ndarray]] = {"ink": ink, "neon": neon}
    for index, icon in enumerate(rasterise(icons).values()):
        for _ in range(copies):
            rgba = np.asarray(place(icon, rng), dtype=np.float32) / 255
            small = shrink(rgba)
            joint = shrink(blur(edges(rgba), 1.0))[..., 0]
            fixed = {name: shrink(draw(rgba)) for name, draw in drawn.items()}
            for where, colour in enumerate(GROUNDS.values()):
                flat = small[..., :3] + (1 - small[..., 3:]) * (np.array(colour) / 255)
                rows["base"].append(flat)
                rows["terracotta"].append(terracotta(flat, joint))
                for name, picture in fixed.items():
                    rows[name].append(picture)
                subject.append(index)
                ground.append(where)
    packed = {
        name: np.ascontiguousarray(np.stack(list_).transpose(0, 3, 1, 2) * 2 - 1, dtype=np.float32)
        for name, list_ in rows.items()
    }
    return Bank(packed.pop("base"), packed, np.array(subject), np.array(ground))
