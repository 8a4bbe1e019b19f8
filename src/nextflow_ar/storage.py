"""Files that are whole or absent: atomic writes, checkpoint folders with checksums, one-line errors.

A checkpoint folder is written beside its final place and moved there in one step, so a full disk or a kill leaves the
old one intact. ``checksums.json`` names every file with its SHA-256; loading verifies what it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

CHECKSUMS = "checksums.json"


class StorageError(RuntimeError):
    """A checkpoint cannot be written or read: one line that names the file and the reason."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a crash sees the old or the new content, never a part. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replace ``folder`` by what ``fill(temporary)`` writes, checksums added. On any error the old folder stays.

    Raises StorageError when the disk is full or the place not writable.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_checked(folder: Path, name: str) -> bytes:
    """A checkpoint folder's file, verified against its checksum.

    Raises StorageError when the folder or file is missing, or its content is not what was saved.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such checkpoint folder")
    try:
        data = (folder / name).read_bytes()
        sums = _sums(folder)
    except FileNotFoundError:
        raise StorageError(f"{folder}: the checkpoint lacks the file {name}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from None
    if name in sums and hashlib.sha256(data).hexdigest() != sums[name]:
        raise StorageError(f"{folder}: the file {name} is damaged (its checksum differs from {CHECKSUMS})")
    return data


def _sums(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files: its own list, or its part of the list one level up."""
    if (folder / CHECKSUMS).is_file():
        return json.loads((folder / CHECKSUMS).read_text())
    above = folder.parent / CHECKSUMS
    listed = json.loads(above.read_text()) if above.is_file() else {}
    prefix = folder.name + "/"
    return {name.removeprefix(prefix): digest for name, digest in listed.items() if name.startswith(prefix)}


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
        reason = str(error).splitlines()[0][:120]
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


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """State dict in a checkpoint folder's safetensors file. Raises StorageError as :func:`read_checked` does."""
    data = read_checked(folder, name)
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise StorageError(f"{folder}: {name} is not a safetensors file: {error}") from None
