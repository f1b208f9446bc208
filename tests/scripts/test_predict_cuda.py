"""scripts/predict_cuda.py: its arithmetic by hand, and that measured rates take the place of predicted ones."""

import json

import pytest

from layers.quantized import QuantSpec
from scripts import predict_cuda
from scripts.bench.sides import PRECISIONS

LAYER = {"int4": [4, 62e6], "bf16": [6, 8.4e6]}
REST = {"cuBLAS": [1, 84e6]}


def traced(model, precision, ranks, batches, layers=2):
    return {str(batch): {"layer": LAYER, "rest": REST, "seconds": 9.0} for batch in batches}


@pytest.fixture
def predict(monkeypatch, tmp_path):
    monkeypatch.setattr(predict_cuda, "trace", traced)
    monkeypatch.setattr(predict_cuda, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()

    def run():
        predict_cuda.main(output=str(tmp_path / "out.json"), fresh=False)
        return (tmp_path / "out.md").read_text()

    return run


def test_a_step_is_the_sum_of_its_kernels():
    found = traced("", "", 1, [1])["1"]
    # 62e6 / (1e12 x 0.62) + 8.4e6 / (1e12 x 0.84) = 110 us, 10 kernels 13 us; 84e6 / (1e12 x 0.84) = 100 us and 1.3
    assert predict_cuda.step_seconds(found, 10, 1e12) == pytest.approx(10 * 123e-6 + 101.3e-6)
    assert predict_cuda.step_bytes(found, 10) == 10 * 70.4e6 + 84e6


def test_memory_by_hand():
    blocks = 80 * (10240 * 8192 + 8192 * 8192 + 3 * 28672 * 8192)
    norms, embedding = 161 * 8192 * 2, 128256 * 8192 * 2
    for groupsize in (32, 128):
        weight = 0.5 + 4 / groupsize  # a scale and a zero of 2 bytes a group
        size = predict_cuda.model_bytes("Llama-3.1-70B", QuantSpec(4, groupsize), "int4")
        assert size == (blocks + embedding / 2) * weight + norms + embedding


def test_the_table_says_that_it_is_predicted_until_something_is_measured(predict, tmp_path):
    text = predict()
    assert "Predicted, not measured" in text and "measured)" not in text
    # 32 layers of 49.67 us and the rest, 34.63 us, at 3 TB/s
    assert text.count("| bf16 | 616 | 1232 |") == 1
    row = {"median": {"decode_tok_s": 205.4}}
    device = {"machine": {"gpu": "NVIDIA H200"}, "model": "Llama-3.1-8B"}
    rows = {"compiled step, bf16, batch 1, prompt 8": row, "compiled step, bf16, profile": {"kernels": []}}
    (tmp_path / "benchmarks" / "device-nvidia-h200.json").write_text(json.dumps(device | {"rows": rows}))
    assert predict().count("| bf16 | 205 (measured) |") == 1
    assert len(PRECISIONS) == 4
