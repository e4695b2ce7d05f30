"""The files that carry a tokenizer from one place to another. Knows nothing about where they are written."""

from __future__ import annotations

import json
from typing import Any

from haomiao.text.parts import Parts


def files_of(parts: Parts, tokenizer_json: str) -> dict[str, bytes]:
    """Name -> content of everything that makes up the tokenizer."""
    config = {key: value for key, value in parts.config.items() if key != "chat_template"}
    added = parts.backend.get_added_tokens_decoder()
    for key, id_ in (("bos_token", parts.bos_id), ("eos_token", parts.eos_ids[0] if parts.eos_ids else None)):
        if key not in config:
            config[key] = (
                None if id_ is None else (added[id_].content if id_ in added else parts.backend.id_to_token(id_))
            )
    config["add_bos_token"] = parts.bos_id is not None and parts.bos_id in parts.prefix
    config["add_eos_token"] = bool(parts.eos_ids) and parts.eos_ids[0] in parts.suffix
    files = {"tokenizer.json": tokenizer_json.encode("utf-8"), "tokenizer_config.json": _dump(config)}
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
