"""What models are on this disk: each with its family, its size and the format of its weights."""

from collections import Counter
from pathlib import Path

from cli import in_words
from weights.checkpoint import CHECKPOINTS, adapter_in, open_model
from weights.files import read_json, size_text
from weights.gguf_file import gguf_models, is_gguf, read_gguf_metadata
from weights.huggingface import weight_files
from weights.layout import ModelFile


def list_models(checkpoints: Path = CHECKPOINTS) -> None:
    """Print a line for each model in checkpoints/OWNER/NAME."""
    lines = [line for folder in sorted(checkpoints.glob("*/*")) if folder.is_dir() for line in lines_of(folder)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)] if lines else []
    for line in lines:
        print("  ".join([*map(str.ljust, line, widths), line[3]]))
    if not lines:
        print(f"No model is in {checkpoints}; scripts/download.py fetches one")


def lines_of(folder: Path) -> list[tuple[str, str, str, str]]:
    """Path, family, size and format of each model in a folder."""
    ggufs = [path for path in gguf_models(folder) if is_gguf(path)]
    lines = [line_of(path) for path in sorted([*folder.glob("*.pth"), *ggufs])]
    try:
        if (folder / "config.json").exists() and weight_files(folder):
            lines.append(line_of(folder))
        if adapter := adapter_in(folder):
            lines.append((name_of(folder), "", "", adapter))
    except (ValueError, OSError) as error:
        lines.append((name_of(folder), "", "", f"cannot be read: {in_words(error)}"))
    return lines


def line_of(path: Path) -> tuple[str, str, str, str]:
    try:
        opened = open_weights(path)
        size = sum(file.stat().st_size for file in opened.paths or (path,))
        specs = Counter(map(str, opened.table.values())).most_common()
        return name_of(path), family_of(path), size_text(size), ", ".join(spec for spec, _ in specs) or "floats"
    except (ValueError, OSError) as error:
        return name_of(path), "", "", f"cannot be read: {in_words(error)}"


def open_weights(path: Path) -> ModelFile:
    """The model that a path names; of a folder its Hugging Face files, not the model.pth made of them."""
    if path.is_dir():
        return open_model(weight_files(path)[0])
    return open_model(path)


def family_of(path: Path) -> str:
    """What config.json calls the architecture, or a GGUF file; ? where neither is there."""
    folder = path if path.is_dir() else path.parent
    files = [path] if path.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if path.suffix != ".gguf" and (folder / "config.json").exists():
        return str(read_json(folder / "config.json").get("model_type", "?"))
    return str(read_gguf_metadata(files[0]).get("general.architecture", "?")) if files else "?"


def name_of(path: Path) -> str:
    return str(path.relative_to(path.parents[2] if not path.is_dir() else path.parents[1]))
