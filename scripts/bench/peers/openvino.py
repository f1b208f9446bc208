"""OpenVINO GenAI, on models that optimum-intel has written of the same weights; as a program, it writes one.

    python -m scripts.bench.peers.openvino FOLDER GGUF PRECISION

int8 has a scale and a zero for each row; int4 in groups of 32, as ours, and the head in int8.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from scripts.bench.peers.environment import make_once, python_of
from scripts.bench.peers.protocol import Case

NAME = "openvino"
EXPORT = {  # options of optimum-intel
    "bf16": {"load_in_8bit": False},
    "int8": {"quantization_config": {"bits": 8}},
    "int4": {"quantization_config": {"bits": 4, "sym": False, "group_size": 32, "ratio": 1.0}},
}


class OpenVino:
    """Its pipeline as it comes, but for the number of threads."""

    def __init__(self, folder: str, threads: int):
        import openvino
        import openvino_genai

        self.openvino, self.genai, self.folder, self.asked = openvino, openvino_genai, Path(folder), 0
        self.n_vocab = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def facts(self) -> dict[str, str]:
        core, kept = self.openvino.Core(), ["nncf", "weight_compression"]
        model = core.read_model(self.folder / "openvino_model.xml")
        weights = "bf16"
        if model.has_rt_info(kept):
            weights, size = (model.get_rt_info([*kept, key]).value for key in ("mode", "group_size"))
            weights += ", one scale a row" if size == "-1" else f", groups of {size}"
        isa = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"openvino-genai": version("openvino-genai"), "weights": weights, "takes": " ".join(isa)}

    def measure(self, case: Case) -> dict[str, float]:
        import numpy

        self.asked += 1  # other prompts each time, because it keeps the keys and values of those that it has read
        ids = numpy.array(case.prompts(self.n_vocab, self.asked))
        prompts = self.genai.TokenizedInputs(*(self.openvino.Tensor(each) for each in (ids, numpy.ones_like(ids))))
        found = self.pipeline.generate(prompts, max_new_tokens=case.new_tokens, ignore_eos=True, do_sample=False)
        assert {len(row) for row in found.tokens} == {case.new_tokens}, case
        first, whole = found.perf_metrics.get_ttft().mean, found.perf_metrics.get_generate_duration().mean
        return case.rates(first / 1000, (whole - first) / 1000)


def openvino_folder(gguf: Path, precision: str) -> Path:
    target = gguf.with_name(f"peer-openvino-{precision}")
    return make_once(target, python_of(NAME), "scripts.bench.peers.openvino", gguf, precision)


def export(folder: str, gguf: Path, precision: str) -> None:
    """Write the folder that the pipeline reads."""
    sys.modules["torchvision"] = None  # PyPI's needs CUDA; optimum-intel requires it, and does without
    import torch
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoModelForCausalLM

    Path(folder).mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as plain:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.save_pretrained(plain)
        model = OVModelForCausalLM.from_pretrained(plain, export=True, compile=False, **EXPORT[precision])
        model.save_pretrained(folder)


if __name__ == "__main__":
    folder, gguf, precision = sys.argv[1:]
    export(folder, Path(gguf), precision)
