"""Turn a downloaded model, safetensors or GGUF, into the one file that every command reads fastest."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import sys
import time
from collections import Counter
from pathlib import Path

import torch

from text.tokenizer import save_tokenizer
from weights.checkpoint import open_folder, read_tensors, require_weights_fit, save_checkpoint
from weights.device import DTYPES, parse_dtype
from weights.files import MB, require_writable


def main(*, checkpoint_dir: str, dtype: str, keep_quantized: bool) -> None:
    folder, began = Path(checkpoint_dir), time.perf_counter()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; fetch a model with scripts/download.py")
    target = folder / ("model_quantized.pth" if keep_quantized else "model.pth")
    require_writable(target)
    opened = open_folder(folder, converted=False, keep_quantized=keep_quantized)
    device = torch.device("cpu")
    require_weights_fit(opened.layout, parse_dtype(dtype), device, folder)
    tensors = read_tensors(opened, device, parse_dtype(dtype), "Converting")
    if opened.gguf is not None:
        save_tokenizer(opened.gguf, folder)
    save_checkpoint(target, opened.args, tensors, opened.table)
    size, seconds = target.stat().st_size / MB, time.perf_counter() - began
    if keep_quantized:
        counts = Counter(map(str, opened.table.values())).most_common()
        print(f"{len(opened.table)} layers kept: {', '.join(f'{n} {spec}' for spec, n in counts)}", file=sys.stderr)
    print(f"Wrote {target}: {size:.1f} MB in {dtype}, {seconds:.1f} seconds", file=sys.stderr)


if __name__ == "__main__":
    parser = cli.Parser(description="Write CHECKPOINT_DIR/model.pth from safetensors, .bin or GGUF files.")
    parser.add_argument("--checkpoint_dir", required=True, help="folder of a downloaded model")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument(
        "--keep_quantized",
        action="store_true",
        help="write model_quantized.pth instead, where layers that a GGUF file has in Q4_0, Q4_1 or Q8_0 keep their "
        "codes: int4 or int8 in groups of 32, not rounded again",
    )
    cli.run(main, parser)
