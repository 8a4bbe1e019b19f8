"""Layouts of public data sets, read by their keys as our forms: dialogues, edits, interleaved pages, COCO (docs/data.md).

Everything here is from plain values to plain values; rows.py makes the row and says what is wrong with it.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

MARK = "<image>"
"""Where a picture stands in the text of a dialogue (LLaVA's convention)."""

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".gif"})
HUB_NOTES = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")
"""Files by which Hugging Face's ``datasets`` describes a data set; they hold no rows."""
_PICTURES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".heic", ".tga"}
)
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
_TURN = frozenset({"from", "role", "value", "content", "image", "images", "weight"})
"""What is read of a turn of a dialogue."""
_PART = ("image", "path", "url", "image_url")
"""Where a part of a turn of type image or image_url has its picture."""
_BESIDE = (
    "index", "text", "detail", "cache_control", "min_pixels", "max_pixels", "resized_height", "resized_width",
)  # fmt: skip
"""What such a part may have besides that is no picture, though nothing reads it."""
_EDITS = (
    ("source", "src_img", "source_img", "source_image", "original_image", "input_image"),
    ("target", "edited_img", "target_img", "target_image", "edited_image", "output_image"),
    ("instruction", "edited_prompt_list", "edit_prompt", "edit_instruction", "edit"),
)
_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
"""How JPEG, PNG, GIF, WebP, BMP and TIFF begin in base64."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+(?:=[=\s]*)?")  # linear also in runs of blanks
_UNREAD = frozenset(
    {
        ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
        ".raf", ".exr", ".xcf", ".wmv", ".asf", ".ts", ".mts", ".m2ts", ".m2v", ".flv", ".f4v", ".3gp", ".3g2", ".ogv",
        ".vob", ".rm", ".rmvb", ".divx", ".mxf",
    }
)  # fmt: skip
"""Pictures and videos that may be of no kind that is read here; Pillow's plugins may read some."""


def short(text: str, most: int = 200) -> str:
    """A text as a message quotes it, whatever its length: the middle of a longer one is left out."""
    return text if len(text) <= most else f"{text[: most - 60]}...{text[-20:]} ({len(text)} characters)"


def shown(value: object) -> str:
    """A value of a row as a message quotes it."""
    return short(repr(value), 120)


class LayoutError(ValueError):
    """Values in a known layout that do not fit it: one line, without the place."""


def plain_form(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], frozenset[str]]:
    """Values in one of our own forms, and which keys of a layout were read for it (none: the values are as they were, or
    under our names). Raises LayoutError.
    """
    present = {key for key, value in values.items() if value is not None}
    if "segments" in present:
        return values, frozenset()
    for needed, form, read in _LAYOUTS:
        if needed <= present and (form is not _interleaved or _has_gaps(values["images"], values["texts"])):
            unsaid = set() if isinstance(values.get("system"), str) else {"system"}
            return form(values), frozenset(read & present - unsaid)
    edit = [next((name for name in names if name in present), None) for names in _EDITS]
    if all(edit):
        names = [str(name) for name in edit]
        return _edit(values, *names), frozenset(names)
    return image_folder(values), frozenset()


def unread_of_turns(values: Mapping[str, Any]) -> frozenset[str]:
    """Keys within a dialogue's turns that nothing reads, as ``messages.name``; none where it is no dialogue."""
    key = next((key for key in ("conversations", "messages") if values.get(key) is not None), "")
    turns = values.get(key) if key and values.get("segments") is None else None
    told = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    found = {str(name) for turn in told for name, value in turn.items() if value is not None} - _TURN
    for turn in told:
        weight = turn.get("weight")
        if weight not in (None, 0, 1) and weight == weight:  # pandas says by NaN that there is none
            found.add("weight")
        at = "value" if turn.get("value") is not None else "content"
        parts = turn[at] if isinstance(turn.get(at), list) else []
        for part in (part for part in parts if isinstance(part, Mapping)):
            read = {"type", "text"} if part.get("type") == "text" else {"type", "index", *_PART}
            found |= {
                f"{at}.{name}" for name, value in part.items() if not _empty(value) and name not in read
            }
    return frozenset(f"{key}.{name}" for name in found)


def image_folder(values: Mapping[str, Any], listed: bool = False) -> dict[str, Any]:
    """The names of Hugging Face's image folders as ours; several captions: the first. ``listed``: of a table that lists
    pictures, where a file needs no picture's suffix.
    """
    found = {key: value for key, value in values.items() if value is not None}
    null = {key: None for key in values if key not in found}
    named = next((key for key in ("file_name", "file") if found.get(key)), None)
    if "image" not in found and named and (listed or names_picture(found[named])):
        found["image"] = found.pop(named)
    if "image" not in found and isinstance(found.get("txt"), str):  # the columns of a WebDataset
        shown_by = next(
            (key for key in ("jpg", "jpeg", "png", "webp") if holds_picture(key, found.get(key))), "txt"
        )
        if shown_by != "txt" and "caption" not in found:
            found |= {"image": found.pop(shown_by), "caption": found.pop("txt")}
    if "image" in found and not {"caption", "prompt", "question"} & set(found):
        told = found.pop("text", None) or found.pop("captions", None)
        if told is not None or listed:
            found["caption"] = told[0] if isinstance(told, list) and told else told
    return null | found


def names_picture(value: object) -> bool:
    """Whether a value is the name of a picture's or clip's file."""
    suffix = Path(value).suffix.lower() if isinstance(value, str) and len(value) < 4096 else ""
    return suffix in _PICTURES | VIDEO_SUFFIXES


def holds_picture(key: str, value: object) -> bool:
    """Whether an entry that no form reads is a picture or clip: bytes of one, the name of a file under a key that says so
    (text has addresses and titles that end like one), an address of one under such a key, or a list with any.
    """
    if isinstance(value, Mapping):  # as Hugging Face stores pictures, and sounds
        data = value.get("bytes")
        return holds_picture(key, data if data is not None else value.get("path"))
    if isinstance(value, list):
        return any(holds_picture(key, one) for one in value)
    if isinstance(value, str):
        said = re.search("image|img|pic|photo|frame|video|clip|file|path|jpe?g|png", key.lower())
        return said is not None and (names_picture(value) or _is_inline(value))
    if isinstance(value, bytes | bytearray):
        return "." + key.rpartition(".")[2] in VIDEO_SUFFIXES or _is_picture(bytes(value))
    return isinstance(value, PILImage.Image)


def inline_picture(value: str) -> bytes | None:
    """The bytes of a picture that is written into the row, as base64 or a ``data:`` address; None for a file's name.

    Raises LayoutError.
    """
    told = value
    if value.startswith("data:"):
        head, _, told = value.partition(",")
        if not head.endswith(";base64"):
            raise LayoutError(
                f"a data: address of a picture is data:image/...;base64,..., got {shown(value)}"
            )
    elif len(value) < 64 or not value.startswith(_HEADS) or not _BASE64.fullmatch(value):
        return None
    try:
        return base64.b64decode("".join(told.split()), validate=True)
    except ValueError:
        raise LayoutError(f"a picture in base64 is cut short or damaged, got {shown(value)}") from None


def _is_inline(value: str) -> bool:
    if len(value) < 64 or value.startswith("data:image/"):
        return len(value) >= 64
    if not value.startswith(_HEADS) or not _BASE64.fullmatch(value):
        return False
    told = "".join(value.split()).rstrip("=")  # its head is enough, the end may be cut
    return _is_picture(base64.b64decode(told[: len(told) // 4 * 4]))


def _is_picture(data: bytes) -> bool:
    try:
        with PILImage.open(io.BytesIO(data)):
            return True
    except Exception:  # Pillow's formats fail in their own ways
        return False


def _edit(values: Mapping[str, Any], source: str, target: str, instruction: str) -> dict[str, Any]:
    told = values[instruction]
    if isinstance(told, list):  # several wordings: the first
        told = told[0] if told else ""
    return {"source": values[source], "target": values[target], "instruction": told}


def _has_gaps(images: object, texts: object) -> bool:
    lists = isinstance(images, list) and isinstance(texts, list)
    return lists and any(value is None for value in (*images, *texts))  # pyright: ignore[reportGeneralTypeIssues]


def _interleaved(values: Mapping[str, Any]) -> dict[str, Any]:
    """A page as two lists with gaps (OBELICS): at each place either a text or a picture; maybe behind a prompt."""
    images, texts = values["images"], values["texts"]
    if len(images) != len(texts):
        raise LayoutError(
            f"{len(images)} images and {len(texts)} texts: the lists are to be equally long, with null where the "
            "other has something"
        )
    segments: list[dict[str, Any]] = [{"text": values["prompt"]}] if values.get("prompt") else []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise LayoutError(f"place {i} of images and texts holds {'nothing' if image is None else 'both'}")
        if image is not None or str(text).strip():
            segments.append(_drawn({"image": image} if text is None else {"text": text}))
    return {"segments": segments}


def _drawn(segment: dict[str, Any]) -> dict[str, Any]:
    return segment | {"role": "assistant", "supervised": True}


def _page(values: Mapping[str, Any]) -> dict[str, Any]:
    """A page as sentences and pictures matched to them (mmc4): a picture stands before its sentence."""
    texts, images = values["text_list"], values["image_info"]
    if not isinstance(texts, list) or not isinstance(images, list):
        raise LayoutError("text_list and image_info are lists")
    at: dict[int, list[Any]] = {}
    for i, info in enumerate(images):
        place = info.get("matched_text_index") if isinstance(info, Mapping) else None
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise LayoutError(
                f"image_info[{i}]: matched_text_index is a place in text_list, got {shown(place)}"
            )
        at.setdefault(place, []).append(_page_picture(info, f"image_info[{i}]"))
    segments = []
    for place, text in enumerate(texts):
        segments += [_drawn({"image": image}) for image in at.get(place, [])]
        if not str(text).strip():
            continue
        before = segments[-1].get("text") if segments else None
        if isinstance(before, str) and isinstance(text, str):
            segments[-1]["text"] = f"{before} {text.strip()}"
        else:
            segments.append(_drawn({"text": text}))
    return {"segments": segments}


def _page_picture(info: Mapping[str, Any], place: str) -> Any:
    if info.get("image_base64"):
        try:
            return base64.b64decode(info["image_base64"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise LayoutError(f"{place}: image_base64 is not base64") from None
    found = info.get("image") or info.get("image_name")
    if not found:
        raise LayoutError(f"{place} has neither image_name nor image_base64")
    return found


def _dialogue(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns with a mark where a picture stands (LLaVA's ``conversations``; ``messages`` of role and content)."""
    turns = values.get("conversations") or values.get("messages")
    if not isinstance(turns, list) or not turns:
        raise LayoutError("conversations or messages is a list of at least one turn")
    pictures = _pictures(values, "")
    segments: list[dict[str, Any]] = []
    if isinstance(system := values.get("system"), str) and system.strip():
        segments.append({"text": system, "role": "system", "supervised": False})
    used, own = 0, []
    for i, turn in enumerate(turns):
        role, supervised, pieces = _turn(turn, f"turn {i}")
        own += [piece["image"] for piece in pieces if "image" in piece and not _is_mark(piece)]
        if not pieces and role != "system":  # many dialogues begin with a system turn that says nothing
            raise LayoutError(f"turn {i}: {'the response' if role == 'assistant' else 'it'} is empty")
        before = used
        for piece in pieces:
            if _is_mark(piece):
                if piece.get("index", used) not in (
                    used,
                    used - before,
                ):  # counted in the row, or in every turn
                    raise LayoutError(
                        f"turn {i}: its image has index {shown(piece['index'])}, and is number {used} of the row"
                    )
                piece = {"image": pictures[used] if used < len(pictures) else None}
                used += 1
            segments.append(piece | {"role": role, "supervised": supervised})
    if used != len(pictures) and (used or own != pictures):  # turns may say again what the row does
        raise LayoutError(f"{len(pictures)} images and {used} {MARK} marks: there is to be one mark an image")
    return {"segments": segments}


def _is_mark(piece: Mapping[str, Any]) -> bool:
    return "image" in piece and piece["image"] is None


def _pictures(values: Mapping[str, Any], place: str) -> list[Any]:
    """The pictures that a dialogue or a turn of it names beside its words."""
    found = [
        list(given) if isinstance(given, list) else [] if given is None else [given]
        for given in (values.get("images"), values.get("image"))
    ]
    if place:
        found = [[one for one in given if not _empty(one)] for given in found]
    if all(found) and not all(one in found[0] for one in found[1]):
        raise LayoutError(f"{place}images and image both name pictures: one of them is to have all")
    return found[0] or found[1]


def _empty(value: object) -> bool:
    """Whether a value of a turn is what a table has where there is none."""
    if isinstance(value, Mapping):
        return not any(value.values())
    return value is None or (isinstance(value, str | bytes) and not value)


def _turn(turn: object, place: str) -> tuple[str, bool, list[dict[str, Any]]]:
    """Role of a turn, whether it is supervised, and its texts and pictures; a picture that comes from the row's list is
    ``{"image": None}``.
    """
    if not isinstance(turn, Mapping):
        raise LayoutError(f"{place} is a mapping, got {type(turn).__name__}")
    name = turn.get("from") or turn.get("role")
    if not isinstance(name, str) or name not in _ROLES:
        raise LayoutError(f"{place}: from (or role) is one of {', '.join(_ROLES)}, got {shown(name)}")
    weight = turn.get("weight")
    if not isinstance(weight, int | float | None) or (weight is not None and weight < 0):
        raise LayoutError(f"{place}: weight is 0 (not trained) or 1, got {shown(weight)}")
    pieces = _content(turn.get("value") if turn.get("value") is not None else turn.get("content"), place)
    if pictures := _pictures(turn, f"{place}: "):
        pieces = _placed(pieces, pictures, place)
    return _ROLES[name], _ROLES[name] == "assistant" and weight != 0, pieces


def _placed(pieces: list[dict[str, Any]], pictures: list[Any], place: str) -> list[dict[str, Any]]:
    """A turn's pieces with its own pictures at its marks; without a mark they stand before its text."""
    marks = sum(map(_is_mark, pieces))
    if not marks:
        return [{"image": picture} for picture in pictures] + pieces
    if marks != len(pictures):
        raise LayoutError(
            f"{place}: {len(pictures)} images and {marks} {MARK} marks: there is to be one mark an image"
        )
    given = iter(pictures)
    return [{"image": next(given)} if _is_mark(piece) else piece for piece in pieces]


def _content(content: object, place: str) -> list[dict[str, Any]]:
    """Texts and pictures of a turn's content."""
    if content is None or isinstance(content, str):
        return _pieces(content or "")
    if not isinstance(content, list):
        raise LayoutError(f"{place}: value (or content) is text, got {type(content).__name__}")
    pieces: list[dict[str, Any]] = []
    for part in content:
        if not isinstance(part, Mapping):
            raise LayoutError(f"{place}: a part of content is a mapping, got {type(part).__name__}")
        if part.get("type") == "text":
            pieces += _pieces(str(part.get("text") or ""))
        elif part.get("type") in ("image", "image_url"):
            pieces.append(_shown(part, place))
        else:
            raise LayoutError(
                f"{place}: a part's type is text, image or image_url, got {shown(part.get('type'))}"
            )
    return pieces


def _shown(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The picture of a part of a turn; without one it is a mark, maybe with its ``index`` in the row's list."""
    given = {key: value for key, value in part.items() if value is not None and key != "type"}
    named = [key for key in _PART if not _empty(given.get(key))] or [key for key in _PART if given.get(key)]
    if not named:
        known = {*_PART, *_BESIDE}
        unread = sorted(k for k, v in given.items() if k not in known and isinstance(v, str | Mapping) and v)
        if unread:
            raise LayoutError(
                f"{place}: nothing reads {shown(unread[0])} of a part with an image; accepted: {', '.join(_PART)}"
            )
        if part["type"] == "image_url":
            raise LayoutError(f"{place}: image_url is empty")
        return {"image": None} | ({"index": given["index"]} if "index" in given else {})
    if len({_name(given[key]) for key in named} - {None}) > 1:
        raise LayoutError(f"{place}: a part with an image has one of {' and '.join(named)}")
    found = given[named[0]]
    found = found["url"] if isinstance(found, Mapping) and "url" in found else found
    if not found:
        raise LayoutError(f"{place}: {named[0]} is empty")
    return {"image": found}


def _name(picture: object) -> str | None:
    """What a picture of a part is called; None where it is there itself."""
    if isinstance(picture, Mapping):
        picture = (
            picture["url"] if "url" in picture else None if picture.get("bytes") else picture.get("path")
        )
    return picture if isinstance(picture, str) else None


def _pieces(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(MARK)):
        if i:
            found.append({"image": None})
        if piece.strip():
            found.append({"text": piece.strip()})
    return found


def coco_rows(document: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """COCO's captions file: a row per picture with its first caption (its only text that every picture has).

    The pictures lie where the file is, in ``images/``, or in a folder named like the split (``captions_val2017.json``:
    ``val2017/``), beside the file or one level up. A picture without a caption gives a row without one. Raises LayoutError.
    """
    images, annotations = document.get("images"), document.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise LayoutError("a JSON file is a list of rows, or COCO's mapping of images and annotations")
    captions: dict[Any, str] = {}
    for i, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping) or not isinstance(annotation.get("image_id", 0), int | str):
            raise LayoutError(f"annotations[{i}] is a mapping, its image_id a number")
        if "caption" in annotation:
            captions.setdefault(annotation.get("image_id"), annotation["caption"])
    for i, image in enumerate(images):
        if not isinstance(image, Mapping) or not isinstance(image.get("id", 0), int | str):
            raise LayoutError(f"images[{i}] is a mapping, its id a number")
    if annotations and not captions:
        raise LayoutError("its annotations have no captions (COCO's captions_*.json is what is read)")
    folder = _coco_folder(path, [str(image.get("file_name")) for image in images[:1]])
    return [
        {"image": f"{folder}{image.get('file_name')}", "caption": captions.get(image.get("id"), "")}
        for image in images
    ]


def _coco_folder(path: Path, first: list[str]) -> str:
    split = path.stem.rpartition("_")[2]
    for folder in ("", "images/", f"{split}/", f"images/{split}/", "../", "../images/", f"../{split}/",
                   f"../images/{split}/"):  # fmt: skip
        if first and (path.parent / folder / first[0]).is_file():
            return folder
    return ""


def unreadable(files: list[Path]) -> list[Path]:
    """Those files that look like pictures or videos of kinds that are not read, in order."""
    PILImage.init()
    kinds = (_PICTURES | _UNREAD) - set(PILImage.EXTENSION) - VIDEO_SUFFIXES
    return sorted(p for p in files if p.suffix.lower() in kinds and p.name[0] != ".")


def told_unreadable(files: list[Path]) -> str:
    """How many files :func:`unreadable` found, of what kinds, and one of them."""
    kinds = Counter(p.suffix.lower() for p in files).most_common(8)
    some = ", ".join(f"{suffix} ({n})" for suffix, n in kinds)
    return f"{len(files)} files look like pictures or videos and are not read: {some}, such as {files[0]}"


def saved_folder(folder: Path) -> str:
    """Of a folder that ``datasets`` wrote for itself, which is not read, what it is and what to do; "" for any other."""
    if (folder / "dataset_dict.json").is_file():
        return (
            "a DatasetDict of datasets.save_to_disk is not read: "
            "write one split of it with Dataset.to_parquet and name that file"
        )
    if any(folder.glob("*.arrow")):
        return (
            "an Arrow folder of datasets.save_to_disk is not read: "
            "write it with Dataset.to_parquet and name that file"
        )
    return ""


def deeper(folder: Path, suffixes: tuple[str, ...]) -> str:
    """The end of a message that a folder holds no rows: where in it some are, as in a clone of a data set's repository."""
    found = sorted(
        {
            path.parent
            for pattern in ("*/*", "*/*/*")
            for path in folder.glob(pattern)
            if path.suffix.lower() in suffixes
            and not any(p[0] == "." for p in path.relative_to(folder).parts)
        }
    )
    return f": name {' or '.join(map(str, found[:3]))}" if found else ""


_LAYOUTS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], dict[str, Any]], set[str]], ...] = (
    ({"conversations"}, _dialogue, {"conversations", "images", "image", "system"}),
    ({"messages"}, _dialogue, {"messages", "images", "image", "system"}),
    ({"text_list", "image_info"}, _page, {"text_list", "image_info"}),
    ({"images", "texts"}, _interleaved, {"images", "texts", "prompt"}),
)
"""Keys that say it is this layout, what makes it ours, keys that it reads."""
