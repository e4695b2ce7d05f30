"""The files that carry a tokenizer from one place to another. Knows nothing about where they are written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from haomiao.text.parts import Parts, label_prompt_of, labels_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def files_of(parts: Parts, backend: Backend) -> dict[str, bytes]:
    """Name -> content of everything that makes up the tokenizer."""
    config = {key: value for key, value in parts.config.items() if key not in ("chat_template", "haomiao")}
    added = backend.get_added_tokens_decoder()
    for key, id_ in (("bos_token", parts.bos_id), ("eos_token", parts.eos_ids[0] if parts.eos_ids else None)):
        if key not in config:
            # an added token's own text: the library gives back a normalized form for some
            config[key] = None if id_ is None else added[id_].content if id_ in added else backend.id_to_token(id_)
    marker: dict[str, Any] = {}
    if labels := labels_of(parts.config):
        marker = {"labels": labels, "prompt": label_prompt_of(parts.config)}
    config["add_bos_token"] = parts.bos_id is not None and parts.bos_id in parts.prefix
    config["add_eos_token"] = bool(parts.eos_ids) and parts.eos_ids[0] in parts.suffix
    files = {"tokenizer.json": str(backend.to_str()).encode("utf-8")}
    if parts.exact_model is not None:
        files["tokenizer.model"] = parts.exact_model()
        marker |= {"tokenizer": "tokenizer.model", "flags": parts.exact_flags}
    if marker:
        config["haomiao"] = marker
    files["tokenizer_config.json"] = _dump(config)
    generation = dict(parts.generation_config)
    if parts.eos_ids:
        generation["eos_token_id"] = list(parts.eos_ids)
    if parts.bos_id is not None:
        generation.setdefault("bos_token_id", parts.bos_id)
    if generation:
        files["generation_config.json"] = _dump(generation)
    if parts.chat_template is not None:
        files["chat_template.jinja"] = parts.chat_template.encode("utf-8", "replace")
    return files


def _dump(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=True, indent=2) + "\n").encode("ascii")
