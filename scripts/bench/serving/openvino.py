"""OpenVINO GenAI's continuous batching, which has no server: the same load is put to it in its own process.

    python -m scripts.bench.serving.openvino FOLDER THREADS ROWS

Its figures lack what HTTP, JSON and clients cost on the same cores. Requests join between two steps, as they are due.
"""

import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from measure.memory import peak_main_memory
from scripts.bench.peers.load import LONGEST, Answer, Load, figures
from scripts.bench.peers.protocol import serve


class ContinuousBatching:
    """Its pipeline as it comes, but for the numbers of threads and rows."""

    def __init__(self, folder: str, threads: int, rows: int):
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        self.n_vocab = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        settings = openvino_genai.SchedulerConfig()
        settings.max_num_seqs = rows
        how = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, settings, "CPU", how)

    def facts(self) -> dict[str, str]:
        return {"openvino-genai": version("openvino-genai")}

    def under_load(self, load: Load, seed: str) -> dict[str, float]:
        waiting, running, answers = list(load.asked(self.n_vocab, seed)), [], []
        began = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < load.most and began + waiting[0][0] <= time.perf_counter():
                due, prompt, tokens = waiting.pop(0)
                asked = began + due if load.rate else time.perf_counter()
                answers.append(Answer(tokens, asked))
                running.append((self.request(len(answers), prompt, tokens), answers[-1]))
            if time.perf_counter() - began > LONGEST:
                raise TimeoutError(f"{load.requests} requests were not answered in {LONGEST} s")
            if running:
                self.pipeline.step()
                running = [(handle, answer) for handle, answer in running if not self.is_whole(handle, answer)]
            else:
                time.sleep(max(0.0, began + waiting[0][0] - time.perf_counter()))
        return figures(answers, time.perf_counter() - began)

    def request(self, number: int, prompt: list[int], tokens: int):
        import numpy

        how = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return self.pipeline.add_request(number, self.openvino.Tensor(numpy.array([prompt])), how)

    def is_whole(self, handle, answer: Answer) -> bool:
        """Note when new tokens came."""
        while handle.can_read():
            handle.read()
            answer.pieces.append(time.perf_counter())
        if handle.get_status() == self.genai.GenerationStatus.RUNNING:
            return False
        assert len(answer.pieces) == answer.tokens, (len(answer.pieces), answer.tokens)
        return True


if __name__ == "__main__":
    folder, threads, rows = sys.argv[1:]
    serve(partial(ContinuousBatching, folder, int(threads), int(rows)), peak_main_memory)
