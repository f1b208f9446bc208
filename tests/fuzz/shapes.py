"""Strategies for damaged files: JSON trees with other values, bytes cut and flipped, GGUF files that lie."""

import copy
import json
import struct
from pathlib import Path

from hypothesis import strategies as st

NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 4096, 1 << 24, 1 << 31, 1 << 53, 1 << 63, 10**30, 1e-45, 1e30, 1e308]
NUMBERS += [0.5, -2.5, float("inf"), float("-inf"), float("nan")]
WORDS = ["", "a", "default", "linear", "llama3", "yarn", "silu", "full_attention", "<s>", "</s>", "<|im_end|>", "é"]
WORDS += ["\ud800", "\n", "\x00", "\x1b[31m", "🍕", "x" * 5000, "../model.safetensors", "/etc/passwd"]
NESTED = {"type": "object"}
for _ in range(90):
    NESTED = {"a": [NESTED]}

words = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-3, 300), words)
values = st.one_of(
    leaves,
    st.recursive(
        leaves,
        lambda some: st.one_of(st.lists(some, max_size=4), st.dictionaries(words, some, max_size=4)),
        max_leaves=6,
    ),
    st.just(NESTED),
)


def places(tree, depth=4) -> list[tuple]:
    """The path of everything in a JSON tree; of long lists only the first items."""
    if not depth or not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(min(len(tree), 3)))
    return [(key, *rest) for key in keys for rest in [(), *places(tree[key], depth - 1)]]


@st.composite
def changed(draw, tree, others=()):
    """The tree with one to four values replaced, left out or added. others: keys that may be added at the top."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        known = [*places(tree), *((key,) for key in others)]
        if not known:  # all has been left out
            break
        *way, last = draw(st.sampled_from(known))
        parent = tree
        for key in way:
            parent = parent[key]
        if draw(st.integers(0, 3)) or last not in (parent if isinstance(parent, dict) else range(len(parent))):
            parent[last] = copy.deepcopy(draw(values))  # it may be changed too
        else:
            del parent[last]
    return tree


@st.composite
def damaged(draw, data: bytes):
    """Bytes with some of them changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = min(draw(st.integers(0, 400) | st.integers(0, max(len(data), 1))), len(data))
        how = draw(st.sampled_from(["change", "insert", "cut", "end"]))
        some = draw(st.binary(min_size=1, max_size=8))
        if how == "change":
            data[at : at + len(some)] = some
        elif how == "insert":
            data[at:at] = some
        else:
            del data[at : at + len(some) if how == "cut" else None]
    return bytes(data)


# ---------------------------------------------------------------- GGUF

FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
NATURAL = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}


def packed_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def packed(value) -> tuple[int, bytes]:
    """The type and the bytes of a metadata value; what does not fit into its type is cut to it."""
    kind = NATURAL.get(type(value), STRING)
    if kind == STRING:
        return kind, packed_string(str(value))
    if kind == ARRAY:
        items = [packed(item) for item in value] or [(UINT32, b"")]
        return kind, struct.pack("<IQ", items[0][0], len(value)) + b"".join(data for _, data in items)
    try:
        return kind, struct.pack(FORMS[kind], value)
    except (struct.error, OverflowError):
        wide = 10 if isinstance(value, int) else 12
        return wide, struct.pack(FORMS[wide], value % (1 << 64) if wide == 10 else value)


def gguf_bytes(fields: dict, tensors: dict[str, tuple[list[int], int, int]], data: bytes) -> bytes:
    """A GGUF file, version 3. tensors: name -> (shape as the format has it, type, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, value in fields.items():
        kind, body = packed(value)
        out += packed_string(key) + struct.pack("<I", kind) + body
    for name, (shape, kind, offset) in tensors.items():
        sizes = [size % (1 << 64) for size in shape]
        out += packed_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return out + bytes(-len(out) % 32) + data


# ---------------------------------------------------------------- files


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(tree) -> str:
    return json.dumps(tree, default=lambda value: None)


def link(source: Path, folder: Path, *without: str) -> None:
    """The files of `source`, but for some."""
    for path in source.iterdir():
        if path.name not in without:
            (folder / path.name).symlink_to(path)
