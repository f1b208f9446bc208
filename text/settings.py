"""What files beside a vocabulary say about its tokens and chat templates, laid out as tokenizer_config.json."""

from pathlib import Path

from text.files import read_utf8
from weights.files import read_json

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_settings(folder: Path) -> tuple[dict, dict]:
    """The contents of tokenizer_config.json, completed from the files beside it; and the ids of BOS and EOS."""
    names = ("tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json")
    config, generation, model, special = (read_if_there(folder / name) for name in names)
    if config.get("added_tokens_decoder"):
        config = special | config
    else:  # files of older versions, where transformers lets special_tokens_map.json win
        config |= special
        config["added_tokens_decoder"] = older_added_tokens(read_if_there(folder / "added_tokens.json"), config)
    config["chat_template"] = find_templates(folder, config)
    eos = [*id_list(generation.get("eos_token_id")), *id_list(model.get("eos_token_id"))]
    bos = [*id_list(generation.get("bos_token_id")), *id_list(model.get("bos_token_id")), None]
    return config, {"bos_token_id": bos[0], "eos_token_id": eos}


def read_sampling(path: str | Path) -> dict:
    """What generation_config.json beside a checkpoint, or in its folder, says about how tokens are drawn."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    found = read_if_there(folder / "generation_config.json")
    return {name: found[name] for name in SAMPLING if found.get(name) is not None}


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def older_added_tokens(ids: dict, config: dict) -> dict:
    """added_tokens.json, {text: id}, laid out as added_tokens_decoder."""
    named = special_names(config)
    return {
        str(i): {"content": text, "special": text in named, "normalized": text not in named} for text, i in ids.items()
    }


def special_names(config: dict) -> set[str]:
    """The texts of the tokens to which the settings give a role."""
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    values = [value for key, value in config.items() if key.endswith("_token")]
    values += [value for each in lists if isinstance(each, list) for value in each]
    return {token_text(value) for value in values} - {None}


def token_text(value) -> str | None:
    """tokenizer_config.json writes a token as a string or as {"content": string}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def find_templates(folder: Path, config: dict):
    """The chat templates of a folder: files of their own win over those inside another file, as in transformers."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: read_utf8(path, "the chat template") for name, path in files.items()}
    return config.get("chat_template") or read_if_there(folder / "chat_template.json").get("chat_template")


def named_templates(value) -> dict[str, str]:
    """Settings write one template, a list of {"name": string, "template": string}, or {name: template}."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    named = value if isinstance(value, dict) else {"default": value}
    return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}


def id_list(value) -> list[int]:
    """Configurations write one id, a list of ids or null; -1 is none too, as in files of Llama 1."""
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
