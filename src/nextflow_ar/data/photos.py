"""A folder of pictures as an endless source of random crops in aspect-ratio buckets; broken files are skipped and told."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from nextflow_ar.scales import FINAL_GRIDS, Grid, ScaleSchedule
from nextflow_ar.tokenizer.pictures import PictureError, open_picture, picture_files

_CACHED = 256


class PhotoFolder:
    """Every picture file below ``folder``, each in the bucket (final grid) of the nearest aspect ratio.

    ``broken``: file -> why it was left out, filled as files turn out to be unreadable. Raises PictureError when no file
    can be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PictureError(f"{folder}: no such folder of pictures")
        self.folder = folder
        self.broken: dict[Path, str] = {}
        self.buckets: dict[Grid, list[Path]] = defaultdict(list)
        for path in picture_files([folder]):
            try:
                self.buckets[_bucket(path)].append(path)
            except PictureError as error:
                self.broken[path] = str(error)
        self.grids = sorted(self.buckets)
        self.files = [path for grid in self.grids for path in self.buckets[grid]]
        if not self.files:
            raise PictureError(f"{folder}: none of its {len(self.broken)} picture files can be read")
        shares = np.array([len(self.buckets[grid]) for grid in self.grids], float)
        self._edges = np.cumsum(shares / shares.sum())

    def bucket(self, draw: float) -> Grid:
        """The final grid that ``draw`` (0 to 1) falls on, each as likely as it has pictures."""
        return self.grids[min(int(np.searchsorted(self._edges, draw)), len(self.grids) - 1)]

    def crop(self, seed: tuple[int, ...], height: int, width: int, bucket: Grid | None = None) -> np.ndarray:
        """A random crop, (height, width, 3) uint8, mirrored half of the time, at a random zoom between the picture's own
        pixels and the whole picture. ``bucket``: from its files only. Unreadable files are passed over.
        """
        rng = np.random.default_rng(seed)
        files = self.files if bucket is None else self.buckets[bucket]
        for number in rng.permutation(len(files)):
            path = files[int(number)]
            if path in self.broken:
                continue
            try:
                return _random_crop(_opened(path), rng, height, width)
            except PictureError as error:
                self.broken[path] = str(error)
        if bucket is not None:
            return self.crop(seed, height, width)
        raise PictureError(f"{self.folder}: no picture file is left that can be read")


def _bucket(path: Path) -> Grid:
    try:
        with Image.open(path) as file:  # the header only
            width, height = file.size
    except Exception as error:
        raise PictureError(f"{path}: {' '.join(str(error).split())[:100]}") from None
    try:
        return ScaleSchedule.nearest(height, width, 18).final
    except ValueError:
        return FINAL_GRIDS[0] if height < width else FINAL_GRIDS[-1]  # a very long one is cropped


@lru_cache(maxsize=_CACHED)
def _opened(path: Path) -> Image.Image:
    return open_picture(path)


def _random_crop(picture: Image.Image, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    most = min(picture.height / height, picture.width / width)  # > 1: the picture is larger than the crop
    zoom = most if most <= 1 else float(np.exp(rng.uniform(0.0, np.log(most))))
    h, w = height * zoom, width * zoom
    top, left = rng.uniform(0, picture.height - h), rng.uniform(0, picture.width - w)
    box = (max(0.0, left), max(0.0, top), min(picture.width, left + w), min(picture.height, top + h))
    crop = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box), np.uint8)
    return crop[:, ::-1] if rng.random() < 0.5 else crop
