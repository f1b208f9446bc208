"""What is written of the speed that was measured: the README's table, every case, the targets, a chart."""

from itertools import product
from pathlib import Path

from scripts.bench.peers.protocol import Case
from scripts.bench.report import Report, markdown
from weights.files import atomic_path

NEW_TOKENS = 200
PRECISIONS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours, and llama.cpp's
QUICK = [Case(1, 8, NEW_TOKENS), Case(1, 512, NEW_TOKENS)]
GRID = [Case(batch, prompt, NEW_TOKENS) for batch in (1, 4, 16) for prompt in (8, 512, 2048)]
SHORT = [case for case in GRID if case.prompt == QUICK[0].prompt]
COMPARED = [QUICK[0], Case(1, 2048, NEW_TOKENS), Case(16, 8, NEW_TOKENS)]  # by targets, with each other
FIGURES = {  # their name in tables, and how they are written
    "decode_tok_s": ("decode", "{:.0f} tok/s"),
    "prefill_tok_s": ("prefill", "{:.0f} tok/s"),
    "time_to_first_token_s": ("first token", "{:.2f} s"),
    "peak_memory_gb": ("memory so far", "{:.2f} GB"),
}
# what is wanted of each precision: decoding over llama.cpp's; the share of the memory's rate in a model of gigabytes
OVER_LLAMA = {"bf16": 1.05, "int8": 1.25, "int4": 1.2}
OVER_ALL = 1.2  # decoding over that of the fastest peer
SHARES = {"bf16": 0.85, "int8": 0.75, "int4": 0.65}


def key_of(precision: str, case: Case) -> str:
    return f"{precision}, batch {case.batch}, prompt {case.prompt}"


def sides_in(result: dict) -> list[str]:
    return list(result["cases"][key_of("bf16", QUICK[0])])


def cells(found: dict[str, dict], sides: list[str], figure: str) -> list[str]:
    """A cell for each side: its figure, and of a rate how many times as fast gpt-faster is."""
    medians = {side: each["median"][figure] for side, each in found.items()}
    texts = {side: FIGURES[figure][1].format(value) for side, value in medians.items()}
    if figure.endswith("tok_s"):
        for side in medians.keys() - {"gpt-faster"}:
            texts[side] += f" (x{medians['gpt-faster'] / medians[side]:.2f})"
    return [texts.get(side, "-") for side in sides]


def headline(result: dict) -> str:
    """The README's table: batch 1."""
    sides, rows = sides_in(result), []
    labels = f"decode, {NEW_TOKENS} tokens", f"prefill, {QUICK[1].prompt} tokens"
    for case, figure, label in zip(QUICK, FIGURES, labels, strict=False):
        for precision in PRECISIONS:
            found = result["cases"][key_of(precision, case)]
            rows.append([f"{label}, {precision}", *cells(found, sides, figure)])
    return markdown([f"{result['model']}, {result['threads']} CPU threads, batch 1", *sides], rows)


def full_table(result: dict) -> str:
    """Every case: the tokens of all rows of a batch together."""
    sides, what = sides_in(result), f"{result['model']}, {result['threads']} CPU threads"
    names = [key_of(precision, case) for precision in PRECISIONS for case in GRID]
    cases = {name: result["cases"][name] for name in names if name in result["cases"]}
    parts = []
    for figure, (label, _) in FIGURES.items():
        rows = [[name, *cells(found, sides, figure)] for name, found in cases.items()]
        parts.append(markdown([f"{label}, {what}", *sides], rows))
    rows = [[name, f"{found['median']['decode_tok_s']:.0f} tok/s"] for name, found in result["waterfall"].items()]
    if rows:
        parts.append(markdown(["one technique after the other", f"decode, {what}"], rows))
    return "\n\n".join(parts)


def targets(result: dict) -> str:
    """What was promised, what came, and whether it was kept; ratios of one run."""
    rows = [*against_llama(result, "decode_tok_s", QUICK[0]), *against_llama(result, "prefill_tok_s", QUICK[1])]
    rows += against_all(result)
    for precision in result["in_turn"]:
        rows += against_itself(result["in_turn"], precision)
    start = result["start_up"]
    rows.append(target("cold compile", start["cold_compile_s"], "<=", 12, "s"))
    rows.append(target("first token of a second process", start["warm_first_token_s"], "<=", 7, "s"))
    return markdown(["target", "wanted", "measured", ""], rows)


def target(what: str, value: float, sign: str, limit: float, unit: str = "x") -> list[str]:
    kept = value >= limit if sign == ">=" else value <= limit
    return [what, f"{sign} {limit:g} {unit}", f"{value:.2f} {unit}", "" if kept else "missed"]


def against_llama(result: dict, figure: str, case: Case) -> list[list[str]]:
    rows = []
    for precision, theirs in PRECISIONS.items():
        found = result["cases"][key_of(precision, case)]
        if "llama.cpp" in found:
            ratio = found["gpt-faster"]["median"][figure] / found["llama.cpp"]["median"][figure]
            what, limit = ("decode", OVER_LLAMA[precision]) if case == QUICK[0] else (f"prefill of {case.prompt}", 1.5)
            rows.append(target(f"{precision} {what} against llama.cpp {theirs}", ratio, ">=", limit))
    return rows


def against_all(result: dict) -> list[list[str]]:
    """Decoding of each batch after a short prompt, against the fastest of the other sides."""
    rows = []
    for precision, case in product(PRECISIONS, SHORT):
        found = result["cases"].get(key_of(precision, case), {})
        rates = {side: each["median"]["decode_tok_s"] for side, each in found.items()}
        own = rates.pop("gpt-faster", None)
        if rates:
            side = max(rates, key=rates.get)
            what = f"{precision} decode at batch {case.batch} against the fastest peer, {side}"
            rows.append(target(what, own / rates[side], ">=", OVER_ALL))
    return rows


def engines(result: dict) -> str:
    """What each side says of itself, and why others are left out."""
    rows = [
        [name, ", ".join(f"{key} {fact}" for key, fact in facts.items())] for name, facts in result["engines"].items()
    ]
    rows += [[name, f"left out: {why}"] for name, why in result["left_out"].items()]
    return markdown(["engine", f"on {result['machine']['processor']}"], rows)


def against_itself(found: dict, precision: str) -> list[list[str]]:
    """Decoding against the memory, at a late position against an early one, of many rows against one."""
    reads, rows = found[precision]["bandwidth"], []
    rates = {key: each["median"]["decode_tok_s"] for key, each in found[precision]["cases"].items()}
    rate, far, many = (rates.get(key_of(precision, case)) for case in COMPARED)
    size, slot = reads["weight_bytes_per_token"], reads["kv_bytes_per_position"]
    if found["bf16"]["bandwidth"]["weight_bytes_per_token"] > 1e9:
        what = f"{precision} decode, of the rate at which our operator reads one large matrix"
        rows.append(target(what, rate * size / 1e9 / reads["measured_bandwidth_gb_s"], ">=", SHARES[precision]))
    if far:
        what = f"{precision} step at position 2148 against 108, over that of their bytes"
        rows.append(target(what, rate / far / ((size + 2148 * slot) / (size + 108 * slot)), "<=", 1.2))
    if many and precision == "bf16":
        rows.append(target("bf16 decode at batch 16 against batch 1", many / rate, ">=", 6))
    return rows


def chart(result: dict, path: Path) -> None:
    """Decoding at batch 1: each precision beside its peers and, if it was measured, one technique after the other."""
    import matplotlib.pyplot as plt

    steps = {name: found["median"]["decode_tok_s"] for name, found in result["waterfall"].items()}
    width, ratios = (11, (3, 2)) if steps else (7, (1,))
    figure, panels = plt.subplots(1, len(ratios), figsize=(width, 4), width_ratios=ratios, squeeze=False)
    compare_sides(panels[0, 0], [result["cases"][key_of(precision, QUICK[0])] for precision in PRECISIONS])
    figure.suptitle(f"decode, tokens/s: {result['model']}, batch 1, {result['threads']} CPU threads")
    if steps:
        axes = panels[0, 1]
        axes.bar_label(axes.barh(list(steps), list(steps.values())), fmt="%.0f", padding=2)
        axes.invert_yaxis()
        axes.set_title("one technique after the other")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.1)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


def compare_sides(axes, cases: list[dict]) -> None:
    """A group of bars for each precision, as wide as it has sides, around its label; the legend stands above."""
    width = 0.8 / len(cases[0])
    for n, side in enumerate(cases[0]):
        places = {j: list(each).index(side) + 0.5 - len(each) / 2 for j, each in enumerate(cases) if side in each}
        heights = [cases[j][side]["median"]["decode_tok_s"] for j in places]
        bars = axes.bar([j + width * place for j, place in places.items()], heights, width, label=side, color=f"C{n}")
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(cases)), PRECISIONS)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def picture(result: dict, name: str) -> str:
    """The chart in Markdown, and why a precision has two figures in it."""
    text = f"![decoding at batch 1, in tokens per second]({name})"
    if result["waterfall"]:
        text += "\n\nEach panel was measured by itself, and the machine's speed drifts: int8 and int4 have two figures."
    return text


def write_files(report: Report) -> None:
    """Markdown and a chart, beside the result."""
    result, path = report.result, Path(report.output)
    heading = f"`{result['command']}`, {result['machine']['date']}"
    drawing = path.with_suffix(".svg")
    chart(result, drawing)
    with atomic_path(path.with_suffix(".md")) as temporary:
        parts = [heading, headline(result), engines(result), picture(result, drawing.name), targets(result)]
        parts.append(full_table(result))
        temporary.write_text("\n\n".join(parts) + "\n")
