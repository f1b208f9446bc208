"""Who guesses tokens ahead of a model: the flags, their checks, and what is loaded."""

import argparse
from pathlib import Path

import torch

from engine.compile import compile_step
from engine.decode import forward_chunk
from engine.speculation.drafters import Drafter, DraftModel, PromptLookup, draft_one_token
from engine.speculation.guess_length import check_length
from engine.speculation.own_layer import OwnLayer, load_guesses, require_guesses
from engine.speculation.speculative import Speculation, build_speculation
from flags import checkpoint_path, number_or_text
from layers.quantized import quant_spec
from model import Transformer
from ranks import Ranks
from text.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary
from weights.checkpoint import load_model
from weights.device import parse_dtype, pick_device


def speculation_flags(group) -> None:
    text = "a smaller model that guesses; same tokenizer"
    group.add_argument("--draft_checkpoint_path", metavar="PATH", type=checkpoint_path, help=text)
    group.add_argument("--draft_device", help="where it runs (default: where the model does)")
    text = "ngram: guess what followed the same words before; mtp: by the layer that the model itself brings"
    group.add_argument("--speculate", choices=["ngram", "mtp"], help=text)
    group.add_argument(
        "--speculate_k",
        type=number_or_text,
        metavar="K",
        help="tokens to guess at a time, to 32 on a CPU and 63 on CUDA, or auto: as many as pay (default: auto)",
    )


def check_speculation(args: argparse.Namespace, path: Path, device: torch.device, ranks: Ranks | None) -> None:
    """Refuse arguments that cannot work with the model at `path`."""
    if args.draft_checkpoint_path is not None and args.speculate is not None:
        raise ValueError("--draft_checkpoint_path and --speculate are both given; give one source of guesses")
    if args.draft_checkpoint_path is not None and args.random_weights:
        raise ValueError(
            "--random_weights has no tokenizer that a draft could share; leave out --draft_checkpoint_path"
        )
    if args.speculate == "mtp":
        if args.random_weights or ranks is not None:
            raise ValueError("--speculate mtp needs a model from a file, and one process; or use --speculate ngram")
        require_guesses(path)
    if args.draft_device is not None:
        if args.draft_checkpoint_path is None:
            raise ValueError("--draft_device needs --draft_checkpoint_path")
        pick_device(args.draft_device)
    if args.speculate_k is not None:
        if not speculates(args):
            raise ValueError("--speculate_k needs --draft_checkpoint_path or --speculate ngram or mtp")
        check_length(args.speculate_k, device)


def speculates(args: argparse.Namespace) -> bool:
    return args.speculate is not None or args.draft_checkpoint_path is not None


def choose_speculation(
    args: argparse.Namespace, path: Path, model: Transformer, tokenizer: Tokenizer
) -> Speculation | None:
    """Who guesses ahead of the model from `path`, and the function that verifies the guesses, compiled as asked."""
    if not speculates(args):
        return None
    if args.speculate == "mtp":
        spec = quant_spec(args.quantize, args.groupsize)
        drafter = OwnLayer(load_guesses(path, model, spec, args.dequantize))
    else:
        drafter = PromptLookup() if args.speculate else load_draft(args, model, tokenizer)
    return build_speculation(model, drafter, args.speculate_k, args.compile)


def load_draft(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> Drafter:
    """The draft model, checked to have the tokenizer of the model."""
    device = model.device if args.draft_device is None else pick_device(args.draft_device)  # on every rank
    path = Path(args.draft_checkpoint_path)
    draft = load_model(path, device, parse_dtype(args.dtype), dequantize=args.dequantize)
    draft.cache_dtype = model.cache_dtype
    require_same_vocabulary(tokenizer, load_tokenizer(path, draft.args.vocab_size))
    step = compile_step(draft_one_token, device) if args.compile else draft_one_token
    forward = compile_step(forward_chunk, device, any_length=True) if args.compile_prefill else forward_chunk
    return DraftModel(draft, step, forward)
