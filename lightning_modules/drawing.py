"""Images with words: tiles in rows, each with a caption, and a legend. Drawn with Pillow, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

Colour: TypeAlias = tuple[int, int, int]

# Blue and vermilion, which people with any colour vision tell apart: Okabe and Ito, "Color Universal Design" (2008).
RIGHT: Colour = (0, 114, 178)
WRONG: Colour = (213, 94, 0)
INK: Colour = (30, 30, 30)
PAPER: Colour = (255, 255, 255)
NOT_A_NUMBER: Colour = (255, 0, 255)

FONT, LINE, GAP, FRAME = 15, 20, 10, 4
"""In pixels: the size of letters, the height of a line, the room between tiles, and the width of a frame."""


@dataclass(frozen=True)
class Tile:
    """An image with what is said of it.

    Attributes:
        image: uint8 ``(3, H, W)``.
        caption: lines below it.
        right: a frame in the colour and with the sign of what is right, or of what is wrong; None has no frame.
    """

    image: Tensor
    caption: tuple[str, ...] = ()
    right: bool | None = None


def sheet(
    tiles: Sequence[Sequence[Tile]],
    title: str,
    columns: Sequence[str] = (),
    legend: Sequence[tuple[Colour, str]] = (),
) -> Tensor:
    """Rows of tiles on white.

    Args:
        tiles: the rows, of tiles of one size.
        title: above all of them; it goes on in further lines where it is long.
        columns: a word above each column.
        legend: colours and what they stand for, below all of them.

    Returns:
        uint8 ``(3, H, W)``.
    """
    _, height, width = tiles[0][0].image.shape
    cell = max(width + 2 * FRAME, 140)
    across = max(cell * max(map(len, tiles)) + GAP * (1 + max(map(len, tiles))), 300)
    heading = _lines(title.split(" "), across - 2 * GAP)
    lines = max((len(tile.caption) for row in tiles for tile in row), default=0)
    down = height + 2 * FRAME + LINE * lines + GAP
    first = GAP + LINE * (len(heading) + bool(columns)) + GAP // 2
    legend, keys, depth = _placed(legend, across)
    page = Image.new("RGB", (across, first + down * len(tiles) + depth), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(heading):
        _write(draw, (GAP, GAP + LINE * i), line, across - 2 * GAP)
    for j, word in enumerate(columns):
        _write(draw, (GAP + j * (cell + GAP) + FRAME, first - LINE), word, cell)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            x, y = GAP + j * (cell + GAP), first + i * down
            if tile.right is not None:
                draw.rectangle((x, y, x + width + 2 * FRAME - 1, y + height + 2 * FRAME - 1), _colour(tile.right))
            else:  # a line where a white image would not be seen to end
                draw.rectangle((x + FRAME - 1, y + FRAME - 1, x + FRAME + width, y + FRAME + height), (200, 200, 200))
            page.paste(Image.fromarray(tile.image.permute(1, 2, 0).numpy()), (x + FRAME, y + FRAME))
            below = y + height + 2 * FRAME
            if tile.right is not None:
                _sign(draw, (x, below + 3), tile.right)
            for k, line in enumerate(tile.caption):
                begin = x + (0 if tile.right is None else LINE) + (FRAME if tile.right is None else 0)
                _write(draw, (begin, below + LINE * k), line, x + cell - begin)
    for (colour, text), (x, y) in zip(legend, keys, strict=True):
        top = first + down * len(tiles) + y
        draw.rectangle((x, top + 3, x + 14, top + 17), colour, outline=INK)
        _write(draw, (x + LINE, top), text, across - x - LINE)
    return torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(*page.size[::-1], 3).permute(2, 0, 1)


def pixels(image: Tensor) -> Tensor:
    """What can be seen of an image ``(C, H, W)`` in [0, 1], of any dtype and on any device: uint8 ``(3, H, W)``.

    Three channels are red, green and blue; of any other number the mean is shown. Where a value is out of [0, 1] the
    image is stretched from its least to its greatest value. What is not finite is magenta. Bytes are from 0 to 255.
    """
    values = image.detach().cpu()
    values = values.double() / 255 if values.dtype == torch.uint8 else values.double()
    if values.shape[0] != 3:
        values = values.mean(dim=0, keepdim=True)
    finite = values.isfinite().all(dim=0)
    values = values.where(finite, 0).expand(3, *values.shape[1:])
    if finite.any():
        low, high = values[:, finite].aminmax()
        if low < 0 or high > 1:
            values = (values - low) / (high - low).clamp_min(1e-12)
    shown = (255 * values.clamp(0, 1)).round().to(torch.uint8)
    return shown.where(finite, torch.tensor(NOT_A_NUMBER, dtype=torch.uint8).view(3, 1, 1))


def sized(image: Tensor, least: int, most: int, *, smooth: bool) -> Tensor:
    """An image that can be seen and is not too large, uint8 ``(3, H, W)``.

    Args:
        image: uint8 ``(3, H, W)``.
        least: smaller ones are enlarged by the whole factor that brings the longer side to this or just below it.
        most: the longer side of larger ones is shrunk to this.
        smooth: shrink by means of pixels, as colours may be mixed; else by leaving pixels out.
    """
    H, W = image.shape[1:]
    longer = max(H, W)
    if (factor := least // longer) > 1:
        return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    if longer <= most:
        return image
    size = max(1, round(H * most / longer)), max(1, round(W * most / longer))
    if smooth:
        return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)
    return F.interpolate(image[None], size, mode="nearest-exact")[0]


def palette(count: int) -> list[Colour]:
    """Colours of so many classes: those of Okabe and Ito, then hues a golden angle apart, light and dark by turns."""
    own = ["000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"]
    colours: list[Colour] = [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in own]
    for k in range(count - len(own)):
        hue, (saturation, value) = (0.78 + 0.618034 * k) % 1.0, ((0.75, 0.65), (0.4, 0.95))[k % 2]
        red, green, blue = (round(255 * level) for level in hsv_to_rgb(hue, saturation, value))
        colours.append((red, green, blue))
    return colours[:count]


def _colour(right: bool) -> Colour:
    return RIGHT if right else WRONG


def _sign(draw: ImageDraw.ImageDraw, at: tuple[int, int], right: bool) -> None:
    """A tick or a cross, 14 pixels wide."""
    x, y = at
    strokes = [((1, 8), (5, 12), (13, 2))] if right else [((2, 2), (12, 12)), ((12, 2), (2, 12))]
    for stroke in strokes:
        draw.line([(x + a, y + b) for a, b in stroke], _colour(right), width=3)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """One line, cut where there is no more room."""
    font = _font()
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    draw.text(at, text, INK, font=font)


def _lines(words: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def _placed(
    legend: Sequence[tuple[Colour, str]], across: int, most: int = 4
) -> tuple[list[tuple[Colour, str]], list[tuple[int, int]], int]:
    """The keys of a legend, where they go, and how high it is: at most so many lines; its last key counts the rest."""
    keys, places = list(legend), []
    x, line = GAP, 0
    for i, (_, text) in enumerate(legend):
        width = LINE + round(_font().getlength(text)) + GAP
        if x > GAP and x + width > across:
            x, line = GAP, line + 1
        if line == most:
            keys[i - 1 :] = [(PAPER, f"and {len(legend) - i + 1} more")]
            break
        places.append((x, line * LINE))
        x += width
    return keys, places, (places[-1][1] + LINE + GAP // 2 if places else 0)
