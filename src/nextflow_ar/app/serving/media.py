"""Pictures as clients send and receive them: data URLs, files of a form, base64."""

from __future__ import annotations

import base64
import binascii
import io
import re

import numpy as np
from PIL import Image as PILImage

from nextflow_ar.app.serving.errors import ApiError, bad
from nextflow_ar.tokenizer.pictures import PictureError, decode_mask, decode_picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read: those without scripts, references or programs of their own."""
_DATA = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100}){0,4};base64,", re.IGNORECASE)


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of a ``data:`` URL. Raises ApiError."""
    head = _DATA.match(url[:600])
    if head is None:
        raise bad("a data URL reads data:image/png;base64,...", param, "invalid_image_url")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad("the data URL is no valid base64", param, "invalid_base64") from None
    return data


def picture(data: bytes, param: str, most: int) -> PILImage.Image:
    """A picture file of at most ``most`` pixels as upright RGB. Raises ApiError."""
    try:
        return decode_picture(data, param, most=most, formats=FORMATS)
    except PictureError as error:
        raise _bad_picture(error, param) from None


def mask(data: bytes, param: str, most: int) -> np.ndarray:
    """(H, W) bool, True where a picture is to be redrawn: as OpenAI's masks where it is transparent, else where it is
    white. Raises ApiError.
    """
    try:
        return decode_mask(data, param, most=most, formats=FORMATS)
    except PictureError as error:
        raise _bad_picture(error, param) from None


def encoded(image: PILImage.Image, kind: str = "png", quality: int | None = None) -> str:
    """A picture file in base64. ``kind``: png, jpeg or webp; ``quality``: 0 to 100 of the last two."""
    out = io.BytesIO()
    given = {} if kind == "png" or quality is None else {"quality": quality}
    image.save(out, format=kind.upper(), **given)
    return base64.b64encode(out.getvalue()).decode()


def data_url(image: PILImage.Image) -> str:
    """A picture as a PNG's data URL."""
    return "data:image/png;base64," + encoded(image)


def _bad_picture(error: PictureError, param: str) -> ApiError:
    return bad(" ".join(str(error).split())[:300], param, "invalid_image")
