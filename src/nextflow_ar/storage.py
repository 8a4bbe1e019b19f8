"""Files that are whole or absent: atomic writes, checkpoint folders with checksums, one-line errors.

A checkpoint folder is written beside its final place and moved there in one step, so a full disk or a kill leaves the
old one intact. ``checksums.json`` names every file with its SHA-256; loading verifies what it reads.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

CHECKSUMS = "checksums.json"
INDEX_SUFFIX = ".index.json"
PART_BYTES = 4 << 30
"""Weights above this are written in parts of at most this."""
_BLOCK = 16 << 20
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The names that safetensors files have for dtypes."""


class StorageError(RuntimeError):
    """A checkpoint cannot be written or read: one line that names the file and the reason."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a crash sees the old or the new content, never a part. Raises StorageError."""
    _write(path, [data])


def _write(path: Path, pieces: Iterable[Any]) -> None:
    """:func:`write_atomic` of what the ``pieces`` (anything with a buffer) are, one after the other."""

    def fill(file: IO[bytes]) -> None:
        for piece in pieces:
            file.write(piece)

    write_stream(path, fill)


def write_stream(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """:func:`write_atomic` of what ``fill(file)`` writes, without holding it. Raises StorageError."""
    # containers on several machines, with a folder that all see, may count their processes alike
    temporary = path.with_name(f".{path.name}.{os.getpid()}_{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_replaceable(folder: Path) -> None:
    """Whether a checkpoint may be written as ``folder``: where nothing is, an empty folder, or an earlier checkpoint whose
    files are all in its checksums. Replacing a folder removes all that is in it. Raises StorageError.
    """
    try:
        if not folder.is_dir():
            if folder.exists() or folder.is_symlink():
                raise StorageError(f"{folder} is a file: name a folder to write")
            return
        left = [f.relative_to(folder) for f in folder.rglob("*") if not f.is_dir() or f.is_symlink()]
        listed = (
            set(json.loads((folder / CHECKSUMS).read_text())) if (folder / CHECKSUMS).is_file() else set()
        )
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from None
    known = {CHECKSUMS, *listed}
    foreign = sorted(
        f.as_posix() for f in left if f.as_posix() not in known and f.parent.name != "__pycache__"
    )
    if foreign:
        raise StorageError(
            f"{folder} holds what is no part of a checkpoint ({foreign[0]}), and would be replaced as a whole: name a new "
            "folder, or move it away"
        )


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace ``folder`` by what ``fill(temporary)`` writes, checksums added. On any error the old folder stays.

    Raises StorageError when the disk is full or the place not writable, and as :func:`check_replaceable` does.
    """
    check_replaceable(folder)
    old = folder.with_name(f".{folder.name}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(folder)
        if old.is_dir() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        name = f".{folder.name}.{_life(os.getpid())}@{_home()}."
        temporary = Path(tempfile.mkdtemp(prefix=name, dir=folder.parent))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        temporary.chmod(0o755)
        fill(temporary)
        sums = {
            f.relative_to(temporary).as_posix(): sha256(f)
            for f in sorted(temporary.rglob("*"))
            if f.is_file()
        }
        write_atomic(temporary / CHECKSUMS, json.dumps(sums, indent=1).encode())
        for attempt in range(3):
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            try:
                temporary.rename(folder)
                break
            except OSError:  # another process put something there in between
                if attempt == 2:
                    raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_dead(folder: Path) -> None:
    """Remove what processes of this machine that are no more had begun to write in place of ``folder``."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*@{glob.escape(_home())}.*"):
        life = left.name.removeprefix(f".{folder.name}.").partition("@")[0]
        number = life.partition("_")[0]
        if number.isdigit() and _life(int(number)) != life:
            shutil.rmtree(left, ignore_errors=True)


def _home() -> str:
    """Where a process's number means one process: the machine and, on Linux, its name space (containers have their own)."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}_{space.stat().st_ino if space.exists() else 0}"


def _life(process: int) -> str:
    """A process, and on Linux when it began: numbers come again. "" of one that is no more."""
    try:
        os.kill(process, 0)
        told = Path(f"/proc/{process}/stat").read_bytes()
        return f"{process}_{told.rpartition(b')')[2].split()[19].decode()}"
    except ProcessLookupError:
        return ""
    except (OSError, IndexError):  # somebody else's, or no Linux
        return f"{process}_0"


def first_line(error: BaseException, most: int = 120) -> str:
    """What an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checked(folder: Path, name: str) -> bytes:
    """A checkpoint folder's file, verified against its checksum.

    Raises StorageError when the folder or file is missing, or its content is not what was saved.
    """
    return b"".join(stream_checked(folder, name))


def stream_checked(folder: Path, name: str) -> Iterator[bytes]:
    """:func:`read_checked` in blocks, for files that are too large to hold: the checksum is known after the last one, so
    read to the end before any of it is believed. Raises StorageError.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such checkpoint folder")
    digest = hashlib.sha256()
    try:
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                yield block
        sums = _sums(folder)
    except FileNotFoundError:
        raise StorageError(f"{folder}: the checkpoint lacks the file {name}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from None
    if name in sums and digest.hexdigest() != sums[name]:
        raise StorageError(f"{folder}: the file {name} is damaged (its checksum differs from {CHECKSUMS})")


def _sums(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files: its own list, or its part of the list one level up."""
    if (folder / CHECKSUMS).is_file():
        return _listed(folder / CHECKSUMS)
    above = folder.parent / CHECKSUMS
    listed = _listed(above) if above.is_file() else {}
    prefix = folder.name + "/"
    return {name.removeprefix(prefix): digest for name, digest in listed.items() if name.startswith(prefix)}


def _listed(path: Path) -> dict[str, str]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no mapping of files to checksums")
    return found


def find_folder(name: str | Path) -> Path | None:
    """A folder here, or a Hub id OWNER/NAME (downloaded); None when it is neither. Raises StorageError for a download."""
    path, text = Path(name), str(name)
    if path.is_dir():
        return path
    if text.count("/") != 1 or text.startswith((".", "/")) or path.exists():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text))
    except Exception as error:
        reason = first_line(error)
        raise StorageError(f"{text}: neither a folder here nor a model on the Hub ({reason})") from None


def push_folder(
    fill: Callable[[Path], None], repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload what ``fill(folder)`` writes to a Hub repository, made if need be; returns its address.

    Raises StorageError when that fails.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "upload"
        write_folder(folder, fill)
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
        except Exception as error:
            reason = " ".join(str(error).split())[:140]
            raise StorageError(f"{repo_id}: the upload failed ({reason})") from None


def pack_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of a state dict."""
    return save_safetensors({k: v.detach().contiguous().cpu() for k, v in tensors.items()})


def weight_files(folder: Path, name: str) -> list[str]:
    """The files that hold a folder's weights: ``name`` itself, or the parts that ``name``'s index lists.

    Raises StorageError as :func:`read_checked` does.
    """
    index = f"{name}{INDEX_SUFFIX}"
    if not (folder / index).is_file():
        return [name]
    try:
        names = sorted(set(json.loads(read_checked(folder, index))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("files of another folder")
        return names
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{folder}: {index} is no index of weights") from None


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """State dict in a checkpoint folder's safetensors file, or in the parts that its index lists.

    Raises StorageError as :func:`read_checked` does.
    """
    return {key: tensor.clone() for key, tensor in stream_weights(folder, name)}


def stream_weights(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """:func:`read_weights` one by one, so that no more than the caller keeps is in memory. Each lies in the file, mapped:
    copy what is to be kept. Every file is verified before the first of its tensors. Raises StorageError.
    """
    for part in weight_files(folder, name):
        for _ in stream_checked(folder, part):
            pass
        try:
            with safe_open(folder / part, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)
        except (SafetensorError, ValueError) as error:
            raise StorageError(f"{folder}: {part} is not a safetensors file: {error}") from None


def write_weights(
    folder: Path,
    name: str,
    like: Mapping[str, Tensor],
    read: Callable[[list[str]], Iterable[Tensor]],
    part_bytes: int = PART_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file ``name`` into ``folder``, or, above ``part_bytes``, parts of at most that (a larger tensor
    is a part of its own) and an index. A tensor is held only while it is written.

    ``like``: tensors of the shapes and dtypes to write, on the meta device if need be. ``read``: called once for every
    file, with names in the order in which their tensors are wanted. Raises StorageError.
    """
    sizes = {key: value.numel() * value.element_size() for key, value in like.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for key in sorted(like):
        if groups[-1] and filled + sizes[key] > part_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += sizes[key]
    stem, suffix = name.rsplit(".", 1)
    listed: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}" if len(groups) > 1 else name
        group.sort(
            key=lambda key: (-like[key].element_size(), key)
        )  # as safetensors itself does, for alignment
        head = _safetensors_head({key: like[key] for key in group}, metadata)
        tensors = zip(group, read(group), strict=True)
        _write(folder / file, itertools.chain([head], (_raw(tensor, like[key]) for key, tensor in tensors)))
        listed |= dict.fromkeys(group, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(listed.items()))}
        write_atomic(folder / f"{name}{INDEX_SUFFIX}", json.dumps(index, indent=1).encode())


def _safetensors_head(like: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """What a safetensors file of these, in this order, begins with: the length of a JSON table, and the table."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, value in like.items():
        begin, end = end, end + value.numel() * value.element_size()
        table[key] = {"dtype": _DTYPES[value.dtype], "shape": [*value.shape], "data_offsets": [begin, end]}
    told = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % 8)
    return len(told).to_bytes(8, "little") + told


def _raw(tensor: Tensor, like: Tensor) -> Any:
    """A tensor's bytes, not copied where it lies on the CPU."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} is not {like.dtype} {tuple(like.shape)}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@contextlib.contextmanager
def open_weights(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Weights by name, not read yet: each has ``get_shape()``, and slicing it reads those rows. Checksums are not verified.

    Raises StorageError when a file is missing or no safetensors file.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}
        for part in weight_files(folder, name):
            try:
                file = stack.enter_context(safe_open(folder / part, framework="pt"))
            except FileNotFoundError:
                raise StorageError(f"{folder}: the checkpoint lacks the file {part}") from None
            except (SafetensorError, OSError) as error:
                raise StorageError(f"{folder}: {part} is not a safetensors file: {error}") from None
            found |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        yield found
