"""The tiny checkpoint that requests and conversations run on, and drafts for it."""

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import make_drafts, make_tiny_checkpoint
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return SimpleNamespace(path=path, model=load_model(path, dtype=torch.float32), tokenizer=load_tokenizer(path))


@pytest.fixture(scope="session")
def drafts(tiny, tmp_path_factory):
    return make_drafts(tiny.path, tmp_path_factory.mktemp("other"))
