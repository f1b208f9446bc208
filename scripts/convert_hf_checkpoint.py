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

from text.tokenizer import tokenizer_saved
from weights.checkpoint import open_folder, read_tensors, require_weights_fit, save_checkpoint
from weights.device import DTYPES, parse_dtype
from weights.files import require_writable, size_text
from weights.layout import dequantized


def main(*, checkpoint_dir: str, dtype: str, dequantize: bool, keep_quantized: bool) -> None:
    folder, began = Path(checkpoint_dir), time.perf_counter()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; fetch a model with scripts/download.py")
    if dequantize and keep_quantized:
        raise ValueError("--dequantize and --keep_quantized are both given; give one")
    target = folder / ("model_quantized.pth" if keep_quantized else "model.pth")
    require_writable(target)
    opened = open_folder(folder, converted=False, keep_codes=not dequantize)
    if keep_quantized and not opened.table:
        raise ValueError(f"{folder} has no layer whose codes can be kept; convert it without --keep_quantized")
    opened = dequantized(opened) if dequantize else opened
    device = torch.device("cpu")
    require_weights_fit(opened.layout, parse_dtype(dtype), device, folder)
    tensors = read_tensors(opened, device, parse_dtype(dtype), "Converting")
    with tokenizer_saved(opened.gguf, folder):
        save_checkpoint(target, opened.args, tensors, opened.table)
    size, seconds = size_text(target.stat().st_size), time.perf_counter() - began
    if opened.table:
        counts = Counter(map(str, opened.table.values())).most_common()
        print(f"{len(opened.table)} layers kept: {', '.join(f'{n} {spec}' for spec, n in counts)}", file=sys.stderr)
    print(f"Wrote {target}: {size} in {dtype}, {seconds:.1f} seconds", file=sys.stderr)


if __name__ == "__main__":
    parser = cli.Parser(description="Write CHECKPOINT_DIR/model.pth from safetensors, .bin or GGUF files.")
    parser.add_argument("--checkpoint_dir", required=True, help="folder of a downloaded model")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    text = "turn the codes of quantised layers into floats (default: they are kept, and not rounded again)"
    parser.add_argument("--dequantize", action="store_true", help=text)
    parser.add_argument("--keep_quantized", action="store_true", help="the default, but into model_quantized.pth")
    cli.run(main, parser)
