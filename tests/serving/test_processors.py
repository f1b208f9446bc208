"""Penalties against transformers' own, biases by hand, and JSON schemas against a validator."""

import json

import jsonschema
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from serving.processors import Logits, processors_of
from tests.serving.test_api import CHAT, answers, post, refusal


def processed(logits, prompt, ids, **how):
    for processor in processors_of(Logits(**how), prompt, None):
        logits = processor(logits, ids)
    return logits


def test_repetition_penalty_is_that_of_transformers():
    logits, prompt, ids = torch.randn(20), [3, 4, 4], [5, 3]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + ids]), logits[None].clone())[0]
    assert torch.equal(processed(logits, prompt, ids, repetition_penalty=1.3), expected)


def test_frequency_presence_and_bias():
    """As OpenAI's documentation has it: logit - count * frequency - (count > 0) * presence."""
    logits = processed(
        torch.zeros(6), [0, 0], [1, 2, 2], frequency_penalty=0.5, presence_penalty=0.25, bias={2: 3.0, 5: -100.0}
    )
    assert logits.tolist() == [0, -0.75, 3 - 1.25, 0, 0, -100]
    assert processors_of(Logits(), [1], None) == []


def test_penalties_reach_the_answer(client):
    choice = post(client, CHAT, repeat_penalty=1e6, max_tokens=20, logprobs=True).json()["choices"][0]
    assert len({bytes(each["bytes"]) for each in choice["logprobs"]["content"]}) == 20


# every answer ends before the context does
SCHEMAS = [
    {
        "type": "object",
        "properties": {"a": {"enum": ["x", "\u00e9\u20ac"]}, "n": {"type": "integer", "minimum": -3, "maximum": 77}},
        "required": ["a", "n"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
    {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 1},
    {"$defs": {"leaf": {"const": 7}}, "type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 2, "maxItems": 2},
    {"type": "string", "pattern": "^[ab]{2,4}$"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_an_answer_follows_its_schema(client, schema):
    described = {"name": "it", "schema": schema, "strict": True}
    form = {"type": "json_schema", "json_schema": described}
    for text in answers(client, CHAT, response_format=form, n=4, temperature=1, max_tokens=None):
        jsonschema.validate(json.loads(text), schema)


def test_json_object_begins_one(client):
    (text,) = answers(client, CHAT, response_format={"type": "json_object"}, max_tokens=20)
    assert text.startswith("{")
    schema = {"schema": {"type": "object", "patternProperties": 3}}
    refusal(
        post(client, CHAT, response_format={"type": "json_schema", "json_schema": schema}), 400, "patternProperties"
    )


def test_a_grammar_that_is_too_large_ends_its_own_request(client):
    pattern = {"type": "string", "pattern": "(a|b)*(ab|cd){1,500}"}
    wide = {"type": "object", "properties": {f"p{i}": pattern for i in range(300)}}
    form = {"type": "json_schema", "json_schema": {"name": "wide", "schema": wide}}
    assert post(client, CHAT, response_format=form).status_code in (200, 400)
    assert post(client, CHAT).status_code == 200
