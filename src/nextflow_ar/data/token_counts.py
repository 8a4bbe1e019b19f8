"""How many tokens a text tokenizer makes of texts, many at once."""

from __future__ import annotations

import hashlib
import json

from tokenizers import Tokenizer

from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast


class TokenCounter:
    """Counts what ``Vocabulary.encode`` makes of texts, on all cores. ``fingerprint``: tokenizers that make the same tokens
    of every text have the same one, whatever special tokens they know besides.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        told = tokenizer.backend_tokenizer.to_str()
        self._core = Tokenizer.from_str(told)
        self._core.encode_special_tokens = True  # as text: see Vocabulary.encode
        self._core.no_truncation()
        self._core.no_padding()
        parts = json.loads(told)
        kept = {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model")}
        kept["added"] = [token for token in parts["added_tokens"] if not token["special"]]
        self.fingerprint = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]

    def __call__(self, texts: list[str]) -> list[int]:
        """Tokens of each."""
        return [len(found) for found in self._core.encode_batch_fast(texts, add_special_tokens=False)]
