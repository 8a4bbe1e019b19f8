"""What changed between two frames: nothing, only the camera, or something in the picture (paper section 3).

Dense optical flow (Farneback) on small grey pictures says whether anything moved. If so, a homography is fitted to tracked
corners; when corners all over the frame follow it, it is the camera's motion: the earlier frame is warped by it, and what
still flows, or still differs, is what moved by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import ConfigDict

from nextflow_ar.config import within
from nextflow_ar.data.sources import SourceError

Change = Literal["still", "camera", "moving"]


@dataclass(frozen=True)
class MotionConfig:
    """When a frame counts as changed. Lengths are shares of the frame's longer side, areas shares of the frame.

    ``side``: frames are compared in grey at this longer side, in pixels. ``shift``: a place moves when its flow is longer
    than this. ``difference``: grey levels (of 255) by which a place has changed although nothing flowed there (a thing that
    appears). ``area``: something moves when so much of the frame does; ``rest``: when so much does that the camera's motion
    does not explain (a fit leaves something: parallax, lens, light). The camera's motion: ``error``: how far a corner may
    lie from where it puts it; ``inliers``: share of the corners that must follow it; ``spread``: share of a grid of 6 x 6
    cells in which some corner must, so that one large moving thing is not taken for the camera.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    side: int = 160
    shift: float = 0.006
    area: float = 0.005
    rest: float = 0.02
    difference: float = 40.0
    error: float = 0.01
    inliers: float = 0.5
    spread: float = 0.4

    def __post_init__(self) -> None:
        if not 16 <= self.side <= 2048:  # matching goes up with the area: larger ones take gigabytes
            raise ValueError(f"side is from 16 to 2048 pixels, got {self.side}")
        within("from 0 to 1", shift=self.shift, area=self.area, rest=self.rest, inliers=self.inliers)
        within("from 0 to 1", error=self.error, spread=self.spread)
        within("above 0", error=self.error)
        if not 0 <= self.difference <= 255:
            raise ValueError(f"difference is from 0 to 255 grey levels, got {self.difference}")


@dataclass(frozen=True)
class Motion:
    """``flowing``: share of the frame that changed. ``own``: share that the camera's motion does not explain (equal to
    ``flowing`` where no such motion was found).
    """

    change: Change
    flowing: float
    own: float


def load_cv2() -> Any:
    """OpenCV. Raises SourceError when it is not installed."""
    try:
        import cv2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("video needs OpenCV: pip install 'nextflow-ar[train]'") from None
    return cv2


def shrink(frame: UInt8[np.ndarray, "h w 3"], config: MotionConfig) -> UInt8[np.ndarray, "i j"]:
    """A frame as :func:`compare` takes it: grey, its longer side ``config.side``."""
    cv2 = load_cv2()
    factor = config.side / max(frame.shape[:2])
    size = (max(16, round(frame.shape[1] * factor)), max(16, round(frame.shape[0] * factor)))
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)


def compare(
    before: UInt8[np.ndarray, "i j"], after: UInt8[np.ndarray, "i j"], config: MotionConfig
) -> Motion:
    """What changed between two frames of :func:`shrink`."""
    cv2 = load_cv2()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # on frames this small threads wait more than they work
    try:
        return _compared(before, after, config)
    finally:
        cv2.setNumThreads(threads)


def _compared(before: np.ndarray, after: np.ndarray, config: MotionConfig) -> Motion:
    everywhere = np.ones(before.shape, dtype=bool)
    flowing = _changed(before, after, everywhere, config)
    if flowing < config.area:
        return Motion("still", flowing, flowing)
    own = flowing
    for pairs in (_tracked, _matched):  # matching bears long ways, tracking little texture
        camera = _fitted(*pairs(before, after, config), before.shape, config)
        if camera is None:
            continue
        own = min(own, _unexplained(before, after, camera, config))
        if own < config.rest:
            return Motion("camera", flowing, own)
    return Motion("moving", flowing, own)


def _unexplained(before: np.ndarray, after: np.ndarray, camera: np.ndarray, config: MotionConfig) -> float:
    """Share of what both frames show that still changes when the earlier one is warped by the camera's motion."""
    cv2 = load_cv2()
    size = (before.shape[1], before.shape[0])
    moved = cv2.warpPerspective(before, camera, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    seen = cv2.warpPerspective(np.full(before.shape, 255, np.uint8), camera, size)
    margin = np.ones((2 * (config.side // 32) + 1,) * 2, np.uint8)  # flow near the border is guessed
    shared = cv2.erode(seen, margin, borderType=cv2.BORDER_CONSTANT, borderValue=0) == 255
    return _changed(moved, after, shared, config)


def _changed(before: np.ndarray, after: np.ndarray, where: np.ndarray, config: MotionConfig) -> float:
    """Share of the places ``where`` that flow, or that differ strongly."""
    cv2 = load_cv2()
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 4, 15, 3, 5, 1.2, 0)
    moved = np.hypot(flow[..., 0], flow[..., 1]) > config.shift * config.side
    smooth = [cv2.GaussianBlur(picture, (5, 5), 0).astype(np.float32) for picture in (before, after)]
    # a change of light is no motion: the mean difference is taken out
    change = smooth[1] - smooth[0]
    change -= np.median(change)
    differs = np.abs(change) > config.difference
    return float(((moved | differs) & where).sum() / max(1, where.sum()))


def _tracked(before: np.ndarray, after: np.ndarray, config: MotionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Corners (n, 2) and where sparse flow (Lucas-Kanade) finds them again, there and back."""
    cv2 = load_cv2()
    corners = cv2.goodFeaturesToTrack(before, 400, 0.01, max(2, config.side // 32))
    if corners is None:
        return np.zeros((0, 2)), np.zeros((0, 2))
    options = {"winSize": (21, 21), "maxLevel": 4}
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, corners, None, **options)
    back, again, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **options)
    corners, there, back = (points.reshape(-1, 2) for points in (corners, there, back))
    loop = np.hypot(*(corners - back).T)
    good = (found.ravel() == 1) & (again.ravel() == 1) & (loop < config.error * config.side)
    return corners[good], there[good]


def _matched(before: np.ndarray, after: np.ndarray, config: MotionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (n, 2) of both frames whose descriptors (SIFT) are alike, and clearly more so than any other's."""
    cv2 = load_cv2()
    finder = cv2.SIFT_create(500)
    (points, told), (others, known) = (finder.detectAndCompute(frame, None) for frame in (before, after))
    if told is None or known is None or len(known) < 2:
        return np.zeros((0, 2)), np.zeros((0, 2))
    found = cv2.BFMatcher().knnMatch(told, known, k=2)
    pairs = [(m.queryIdx, m.trainIdx) for m, second in found if m.distance < 0.75 * second.distance]
    if not pairs:
        return np.zeros((0, 2)), np.zeros((0, 2))
    first = np.array([points[i].pt for i, _ in pairs], np.float32)
    return first, np.array([others[j].pt for _, j in pairs], np.float32)


def _fitted(
    points: np.ndarray, there: np.ndarray, shape: tuple[int, int], config: MotionConfig
) -> np.ndarray | None:
    """The homography (3, 3) that most points all over the frame follow, and which moves them; None when there is none."""
    cv2 = load_cv2()
    if len(points) < 12:
        return None
    cv2.setRNGSeed(0)
    camera, mask = cv2.findHomography(points, there, cv2.RANSAC, config.error * config.side)
    if camera is None or mask.mean() < config.inliers:
        return None
    ways = np.hypot(*(there - points).T)[mask[:, 0] == 1]
    if np.median(ways) <= config.shift * config.side:
        return None
    # a camera that zooms in keeps the middle of the earlier frame, one that zooms out fills the middle of the later
    spreads = []
    for places in (points, there):
        kept = places[mask[:, 0] == 1] / (shape[1], shape[0])
        spreads.append(len({tuple(cell) for cell in np.clip(kept * 6, 0, 5).astype(int).tolist()}))
    return camera.astype(np.float32) if max(spreads) >= config.spread * 36 else None
