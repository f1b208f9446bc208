"""Turn a downloaded model, safetensors or GGUF, into the one file that every command reads fastest."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import command_line

    command_line.quit_on_interrupt()  # before the slow imports

import argparse
import sys
import time
from pathlib import Path

import torch

from checkpoint import (
    DTYPES,
    GB,
    parse_dtype,
    read_tensors,
    require_weights_fit,
    require_writable,
    save_checkpoint,
    source_from_folder,
)
from tokenizer import save_tokenizer


def main(*, checkpoint_dir: str, dtype: str) -> None:
    folder, began = Path(checkpoint_dir), time.perf_counter()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; fetch a model with scripts/download.py")
    target = folder / "model.pth"
    require_writable(target)
    source = source_from_folder(folder, converted=False)
    device = torch.device("cpu")
    require_weights_fit(source.args, parse_dtype(dtype), source.table, device, folder)
    tensors = read_tensors(source, device, parse_dtype(dtype), "Converting")
    if source.gguf is not None:
        save_tokenizer(source.gguf, folder)
    save_checkpoint(target, source.args, tensors)
    size, seconds = target.stat().st_size / GB, time.perf_counter() - began
    print(f"Wrote {target}: {size:.2f} GB in {dtype}, {seconds:.1f} seconds", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write CHECKPOINT_DIR/model.pth from safetensors, .bin or GGUF files.")
    parser.add_argument("--checkpoint_dir", required=True, help="folder of a downloaded model")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    command_line.run(main, parser)
