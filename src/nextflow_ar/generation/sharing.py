"""A loaded checkpoint as a folder, or as a repository on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nextflow_ar.generation.base import Loaded
from nextflow_ar.model.checkpoint import Bundle, fill_bundle
from nextflow_ar.storage import push_folder, write_folder


class Sharing(Loaded):
    """How a loaded checkpoint is passed on. Its model card goes with it."""

    def save_pretrained(self, folder: Path | str, *, card: str | None = None) -> None:
        """Write a self-contained checkpoint folder, atomically, weights in bf16. transformers can load it too (docs/
        integrations.md). ``card``: text of its README.md instead of the card that came with the checkpoint.

        Raises StorageError; an older folder of that name then stays.
        """
        bundle = self._carded(card)
        write_folder(Path(folder), lambda target: fill_bundle(target, bundle))

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, card: str | None = None
    ) -> str:
        """Upload the folder of :meth:`save_pretrained` to the Hub repository OWNER/NAME, made if need be; returns its
        address. Raises StorageError.
        """
        bundle = self._carded(card)
        return push_folder(lambda target: fill_bundle(target, bundle), repo_id, private=private, token=token)

    def _carded(self, card: str | None) -> Bundle:
        return self.bundle if card is None else replace(self.bundle, card=card)
