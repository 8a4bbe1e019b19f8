"""The one data format: a row is a document of texts and pictures in order, some of them supervised (docs/data.md).

Rows come from any source as plain mappings; the short forms that people's data sets have (a picture and its caption, an
edit, a question) are read as the full form. Everything that is wrong with a row is said in one line.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage
from PIL import ImageOps

from nextflow_ar.data.layouts import (
    MARK,
    LayoutError,
    holds_picture,
    inline_picture,
    plain_form,
    short,
    shown,
    unread_of_turns,
)
from nextflow_ar.sequence.dialogue import JOINT
from nextflow_ar.tokenizer.pictures import PictureError, decode_picture, open_picture, to_rgb

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = ("system", "user", "assistant")
_ORIENTATION = 0x0112  # the EXIF tag


def printable(text: str) -> str:
    """A text that can be written anywhere: bytes of file names that are no UTF-8 as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class RowError(ValueError):
    """A row does not fit the format: one line that says what and what is accepted."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class LeftOut(RowError):
    """A row that a filter leaves out on purpose (a clip in which nothing moves): no fault of the data."""


@dataclass(frozen=True)
class PictureRef:
    """A picture that is not open yet: a file, or the bytes of one. ``name``: what to call it in messages."""

    name: str
    path: Path | None = None
    data: bytes | None = None

    def open(self) -> PILImage.Image:
        """Upright, as 8-bit RGB. Raises PictureError."""
        if self.path is None:
            return decode_picture(self.data or b"", self.name)
        return open_picture(self.path, self.name)

    def size(self) -> tuple[int, int]:
        """(height, width) of what :meth:`open` gives, from the header alone. Raises PictureError."""
        with self._header() as file:
            known = file.format in ("JPEG", "MPO", "WEBP")  # a PNG would be decoded to look for the tag
            try:
                turned = known and file.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            except Exception as error:  # damaged notes of a camera
                reason = " ".join(str(error).split())[:100]
                raise PictureError(f"{self.name}: damaged picture ({reason})") from None
            return (file.width, file.height) if turned else (file.height, file.width)

    def content(self) -> tuple[bytes, str]:
        """The bytes of its file, untouched, and the suffix that fits them ("png"). Raises PictureError."""
        with self._header() as file:
            kind = file.format or "PNG"
        data = self.data if self.path is None else self.path.read_bytes()
        known = [suffix[1:] for suffix, of in PILImage.registered_extensions().items() if of == kind]
        usual = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
        return data or b"", usual if usual in known or kind == "MPO" or not known else known[0]

    def _header(self) -> PILImage.Image:
        try:
            return PILImage.open(self.path if self.path is not None else io.BytesIO(self.data or b""))
        except (FileNotFoundError, NotADirectoryError):
            raise PictureError(f"{self.name}: no such file") from None
        except IsADirectoryError:
            raise PictureError(f"{self.name}: is a folder, not a picture") from None
        except PermissionError:
            raise PictureError(f"{self.name}: may not be read") from None
        except Exception as error:
            reason = " ".join(str(error).split())[:100]
            raise PictureError(f"{self.name}: damaged or no picture ({reason})") from None


@dataclass(frozen=True)
class TextPart:
    """A run of text. ``supervised``: it is a response, which carries loss."""

    text: str
    role: Role
    supervised: bool


@dataclass(frozen=True)
class PicturePart:
    """A picture. ``supervised``: it is drawn, and carries loss."""

    picture: PictureRef
    role: Role
    supervised: bool


Part = TextPart | PicturePart


@dataclass(frozen=True)
class Row:
    """One document. ``where``: file and place, for messages; ``ignored``: keys beside its form that nothing reads;
    ``doubts``: what may be amiss with it though it can be read, as "n rows ..." goes on.
    """

    parts: tuple[Part, ...]
    where: str
    ignored: frozenset[str] = field(default=frozenset(), compare=False)
    doubts: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def pictures(self) -> list[PictureRef]:
        """Its pictures, in order."""
        return [part.picture for part in self.parts if isinstance(part, PicturePart)]

    @property
    def supervised(self) -> list[Part]:
        """The parts that carry loss."""
        return [part for part in self.parts if part.supervised]


def parse_row(values: Mapping[str, Any], where: str, folder: Path | None = None) -> Row:
    """A row from plain values, in the full form, one of the short ones, or a layout that :mod:`layouts` knows.

    ``folder``: what its paths are relative to. Raises RowError.
    """
    reader, given = _Reader(where, folder), values
    every = {key for key, value in values.items() if value is not None}
    try:
        values, read = plain_form(values)
    except LayoutError as error:
        raise RowError(f"{where}: {error}") from None
    present = {key for key, value in values.items() if value is not None}
    if "segments" in present:
        left = every - (read or {"segments"}) | unread_of_turns(given)
        return reader.sound(reader.full(values["segments"]), given, left)
    for needed, form in _FORMS:
        if needed <= present:
            left = every - read if read else present - needed - ({"prompt"} if form is _story else set())
            if form in (_drawing, _captioned) and (answers := sorted(left & _ANSWERS)):
                raise RowError(
                    f"{where}: a picture is drawn from {' + '.join(sorted(needed))}, and nothing reads {answers[0]!r}: "
                    "question + answer or prompt + response are about a picture"
                )
            row = reader.sound(form(reader, values), given, left)
            if form is _drawing and (unsaid := _unsaid(given)):  # a table may hold rows of both kinds
                doubt = f"with a picture and a prompt have {unsaid} null: drawn, or is the answer missing?"
                row = replace(row, doubts=row.doubts | {doubt})
            return row
    accepted = "; ".join(" + ".join(sorted(needed)) for needed, _ in _FORMS)
    empty = sorted(_READ & {key for key, value in given.items() if value is None})
    null = f" ({', '.join(empty)} {'are' if len(empty) > 1 else 'is'} null)" if empty else ""
    raise RowError(
        f"{where}: no known form among the keys {short(str(sorted(present)), 400)}{null}; accepted: segments; {accepted}"
    )


def _unsaid(given: Mapping[str, Any]) -> str:
    """The key whose null may be a response that was lost; not where the question to it is null as well (another form's)."""
    null = {key for key, value in given.items() if value is None}
    return next(iter(sorted(null & _ANSWERS - ({"answer"} if "question" in null else set()))), "")


class _Reader:
    def __init__(self, where: str, folder: Path | None) -> None:
        self.where, self.folder = printable(where), folder

    def fail(self, message: str) -> RowError:
        return RowError(f"{self.where}: {message}")

    def text(self, value: object, key: str, *, supervised: bool) -> TextPart:
        if not isinstance(value, str):
            raise self.fail(f"{key} is text, got {type(value).__name__}")
        if not value.strip():
            raise self.fail(f"{key} is empty")
        if (shown := printable(value)) != value:
            at = next(i for i, (a, b) in enumerate(zip(shown, value, strict=False)) if a != b)
            raise self.fail(f"{key} has half of a character: ...{shown[max(0, at - 20) : at + 6]}")
        return TextPart(value.strip(), "assistant" if supervised else "user", supervised)

    def picture(self, value: object, key: str, *, supervised: bool) -> PicturePart:
        role: Role = "assistant" if supervised else "user"
        if isinstance(value, Mapping) and (
            "bytes" in value or "path" in value
        ):  # as Hugging Face stores pictures
            data = value.get("bytes")
            if data is not None and not isinstance(data, bytes | bytearray):
                raise self.fail(f"{key}: bytes are a picture file's, got {type(data).__name__}")
            if data:
                name = printable(f"{self.where}: {short(str(value.get('path') or key))}")
                return PicturePart(PictureRef(name, data=bytes(data)), role, supervised)
            value = value.get("path")
        if isinstance(value, bytes | bytearray):
            return PicturePart(PictureRef(f"{self.where}: {key}", data=bytes(value)), role, supervised)
        if isinstance(value, PILImage.Image):
            buffer = io.BytesIO()
            to_rgb(ImageOps.exif_transpose(value)).save(buffer, "PNG")
            return PicturePart(PictureRef(f"{self.where}: {key}", data=buffer.getvalue()), role, supervised)
        if not isinstance(value, str) or not value:
            raise self.fail(f"{key} is a path or a picture, got {type(value).__name__}")
        try:
            inline = inline_picture(value)
        except LayoutError as error:
            raise self.fail(f"{key}: {error}") from None
        if inline is not None:
            return PicturePart(PictureRef(f"{self.where}: {key}", data=inline), role, supervised)
        if value.startswith(("http://", "https://")):
            raise self.fail(f"{key} is a web address: download the pictures first ({value[:60]})")
        if any(len(part.encode("utf-8", "replace")) > 255 for part in value.split("/")) or len(value) > 4095:
            raise self.fail(f"{key} is neither a picture in base64 nor the name of a file: {shown(value)}")
        path = Path(value)
        if self.folder is not None and not path.is_absolute():
            path = self.folder / path
        name = printable(str(path))  # of a row that is a picture's file, where says it all
        name = name if name == self.where else printable(f"{self.where}: {short(value)}")
        return PicturePart(PictureRef(name, path=path), role, supervised)

    def sound(self, row: Row, given: Mapping[str, Any], left: Set[str]) -> Row:
        """The row, with the keys that nothing read; it must not be that its picture is among them."""
        lost = [] if row.pictures else sorted(key for key in left if holds_picture(key, given.get(key)))
        if lost:
            raise self.fail(
                f"it has words alone, and nothing reads {shown(lost[0])}, which is a picture: name it image (or file_name)"
            )
        null = {key for key in _PICTURES if key in given and given[key] is None and not row.pictures}
        lacking = {
            f"are words alone and have {key} null: rows without a picture, or is it missing?" for key in null
        }
        return replace(row, ignored=frozenset(left), doubts=row.doubts | lacking)

    def full(self, segments: object) -> Row:
        if not isinstance(segments, list) or not segments:
            raise self.fail("segments is a list of at least one text or image")
        parts: list[Part] = []
        for i, segment in enumerate(segments):
            part = self.segment(segment, f"segment {i}")
            before = parts[-1] if parts else part
            kind = (TextPart, before.role, before.supervised)
            if parts and isinstance(before, TextPart) and kind == (type(part), part.role, part.supervised):
                assert isinstance(part, TextPart)  # a text in pieces is one text: what it says ends once
                parts[-1] = replace(before, text=f"{before.text}{JOINT}{part.text}")
            else:
                parts.append(part)
        return self.row(*parts)

    def segment(self, segment: object, place: str) -> Part:
        if not isinstance(segment, Mapping):
            raise self.fail(f"{place} is a mapping, got {type(segment).__name__}")
        # parquet gives every key of the column to every row, as null
        given = {key: value for key, value in segment.items() if value is not None}
        unknown = sorted(set(given) - {"text", "image", "role", "supervised"})
        if unknown:
            raise self.fail(
                f"{place}: unknown key {shown(unknown[0])}; accepted: text or image, role, supervised"
            )
        if ("text" in given) == ("image" in given):
            raise self.fail(f"{place} has either text or image")
        role = given.get("role", "assistant" if given.get("supervised") else "user")
        if role not in ROLES:
            raise self.fail(f"{place}: role is one of {', '.join(ROLES)}, got {shown(role)}")
        supervised = given.get("supervised", role == "assistant")
        if not isinstance(supervised, bool):
            raise self.fail(f"{place}: supervised is true or false, got {shown(supervised)}")
        if "text" in given:
            return TextPart(
                self.text(given["text"], f"{place}: text", supervised=supervised).text, role, supervised
            )
        found = self.picture(given["image"], f"{place}: image", supervised=supervised)
        return PicturePart(found.picture, role, supervised)

    def row(self, *parts: Part) -> Row:
        if not any(part.supervised for part in parts):
            raise self.fail("nothing in it is supervised, so it teaches nothing")
        placed = self.at_marks(parts)
        quotes = any(isinstance(part, TextPart) and MARK in part.text for part in placed)
        return Row(tuple(placed), self.where, doubts=frozenset({_QUOTES} if quotes else ()))

    def at_marks(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with pictures where the ``<image>`` marks of the texts beside them say: one each of those of the same
        turn before a text, or of those behind it; one at its end may be that of a picture of the next turn. A response
        with neither quotes the tag.
        """
        found: list[Part] = []
        free = 0  # pictures at the end of what is found that have no mark yet
        marked = 0  # pictures that come next and have one
        placed = 0  # of these, those that stand already
        for i, part in enumerate(parts):
            if isinstance(part, PicturePart):
                found += [] if placed else [part]
                free, marked, placed = free + (not marked), max(0, marked - 1), max(0, placed - 1)
                continue
            marks = part.text.count(MARK)
            before = self.together(found[len(found) - free :][::-1], part.role)[::-1]
            behind = self.together(parts[i + 1 :], parts[i + 1].role if i + 1 < len(parts) else part.role)
            ends = marks == 1 == len(behind) and part.text.endswith(MARK)
            same = bool(behind) and behind[0].role == part.role
            # a picture that is given, before a response, is not the response's own
            beside = bool(behind) or bool(self.together(found[-1:], part.role))
            if not marks or (part.supervised and not beside):
                found.append(part)
            elif ends and not same and not before:
                found += self.pieces(part, [])
                marked = 1
            elif marks == len(before) and not (ends and same):
                found[len(found) - marks :] = self.pieces(part, before)
            elif marks == len(behind) and same:
                found += self.pieces(part, behind)
                marked = placed = marks
            else:
                raise self.fail(
                    f"{len(before)} images and {marks} {MARK} marks ({part.text[:40]!r}): "
                    "there is to be one mark an image that stands beside the text, or none"
                )
            free = 0
        return found

    def together(self, parts: Sequence[Part], role: Role) -> list[Part]:
        """The pictures of a role's turn that parts begin with."""
        return list(takewhile(lambda p: isinstance(p, PicturePart) and p.role == role, parts))

    def pieces(self, part: TextPart, pictures: Sequence[Part]) -> list[Part]:
        """A text around its marks, at which ``pictures`` stand."""
        texts = [text.strip() for text in part.text.split(MARK)]
        if not any(texts) and not pictures:
            raise self.fail(f"a text is nothing but {MARK} marks")
        found: list[Part] = []
        for text, picture in zip_longest(texts, pictures):
            found += ([replace(part, text=text)] if text else []) + ([picture] if picture is not None else [])
        return found


def _story(r: _Reader, v: Mapping[str, Any]) -> Row:
    images, texts = v["images"], v["texts"]
    if not isinstance(images, list) or not isinstance(texts, list):
        raise r.fail("images and texts are lists")
    if len(images) != len(texts):
        raise r.fail(f"{len(images)} images and {len(texts)} texts: the lists are to be equally long")
    parts: list[Part] = [r.text(v["prompt"], "prompt", supervised=False)] if v.get("prompt") else []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        parts.append(r.text(text, f"texts[{i}]", supervised=True))
        parts.append(r.picture(image, f"images[{i}]", supervised=True))
    return r.row(*parts)


def _edit(r: _Reader, v: Mapping[str, Any]) -> Row:
    if isinstance(v["instruction"], str) and not v["instruction"].replace(MARK, "").strip():
        raise r.fail(f"instruction is {'nothing but ' + MARK if v['instruction'].strip() else 'empty'}")
    return r.row(
        r.picture(v["source"], "source", supervised=False),
        r.text(v["instruction"], "instruction", supervised=False),
        r.picture(v["target"], "target", supervised=True),
    )


def _question(r: _Reader, v: Mapping[str, Any]) -> Row:
    return r.row(
        r.picture(v["image"], "image", supervised=False),
        r.text(v["question"], "question", supervised=False),
        r.text(v["answer"], "answer", supervised=True),
    )


def _about_several(r: _Reader, v: Mapping[str, Any]) -> Row:
    if not isinstance(v["images"], list):
        raise r.fail("images is a list")
    asked, answer = ("question", "answer") if v.get("question") is not None else ("prompt", "response")
    pictures = [r.picture(image, f"images[{i}]", supervised=False) for i, image in enumerate(v["images"])]
    return r.row(
        *pictures, r.text(v[asked], asked, supervised=False), r.text(v[answer], answer, supervised=True)
    )


def _answer(r: _Reader, v: Mapping[str, Any]) -> Row:
    return _question(r, {"image": v["image"], "question": v["prompt"], "answer": v["response"]})


def _drawing(r: _Reader, v: Mapping[str, Any]) -> Row:
    return _captioned(r, v, "prompt")


def _captioned(r: _Reader, v: Mapping[str, Any], key: str = "caption") -> Row:
    told = r.text(v[key], key, supervised=False)
    if told.text.count(MARK) == 1 and told.text.startswith(MARK):  # its picture, as if it were given
        told = r.text(told.text.removeprefix(MARK), key, supervised=False)
    return r.row(told, r.picture(v["image"], "image", supervised=True))


def _dialogue(r: _Reader, v: Mapping[str, Any]) -> Row:
    return r.row(
        r.text(v["prompt"], "prompt", supervised=False), r.text(v["response"], "response", supervised=True)
    )


def _plain(r: _Reader, v: Mapping[str, Any]) -> Row:
    return r.row(r.text(v["text"], "text", supervised=True))


_QUOTES = f"have words that say {MARK} with no picture beside them, kept as words: or is a picture missing?"
_PICTURES = ("image", "images", "file_name")
_ANSWERS = frozenset({"answer", "response", "output"})
_FORMS = (
    (frozenset({"source", "instruction", "target"}), _edit),
    (frozenset({"image", "question", "answer"}), _question),
    (frozenset({"image", "prompt", "response"}), _answer),
    (frozenset({"images", "question", "answer"}), _about_several),
    (frozenset({"images", "prompt", "response"}), _about_several),
    (frozenset({"images", "texts"}), _story),
    (frozenset({"image", "prompt"}), _drawing),
    (frozenset({"image", "caption"}), _captioned),
    (frozenset({"prompt", "response"}), _dialogue),
    (frozenset({"text"}), _plain),
)
_READ = frozenset().union(
    *(needed for needed, _ in _FORMS),
    {"segments", "conversations", "messages", "captions", "file_name", "file"},
)
"""Keys whose null is told where a row has no form."""
