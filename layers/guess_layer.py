"""The layer that guesses the token after the next one, which some models ship (multi-token prediction).

As DeepSeek-AI 2024, DeepSeek-V3, section 2.2. Shapes: B rows, S tokens a row.
"""

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from layers.gpu.linear import NormedLinear
from mixers.norms import block_norm
from model import CacheView, ModelArgs, Transformer


def guess_args(args: ModelArgs) -> ModelArgs:
    """The sizes of the layer of guesses of a model: one block with attention and, where the model has them, experts."""
    alike = {"full_layers": (), "dense_layers": (), "dense_size": None, "unrotated_layers": ()}
    alike |= {"delta": None, "short_conv": None}
    return replace(args, n_layer=1, tie_embeddings=False, **alike)


class GuessLayer(Transformer):
    """A block that takes what the model made of each token, and the embedding of the token that follows it.

    Embedding and output head are those of the model, see `share`. args: of the model.
    """

    def __init__(self, args: ModelArgs):
        super().__init__(guess_args(args))
        self.tok_embeddings = self.output = self.of_model = None
        self.hidden_norm, self.embedding_norm = block_norm(args), block_norm(args)
        self.joined = nn.Linear(2 * args.dim, args.dim, bias=False)

    def share(self, model: Transformer) -> None:
        """Guess for `model`, with its embedding and its head, of what its last norm returns."""
        head = model.output
        joined = isinstance(head, NormedLinear)  # on a GPU the last norm is a part of the head
        self.of_model, self.output = (head.norm, head.layer) if joined else (model.norm, head)
        self.tok_embeddings = model.tok_embeddings
        self.cache_dtype = model.cache_dtype

    def read(self, hidden: Tensor, tokens: Tensor, pos: Tensor, cache: CacheView) -> Tensor:
        """What the block makes [B, S, dim] of pairs, which `logits` takes: of the token after the pair.

        hidden [B, S, dim]: what the model, or this layer, made of the tokens at pos [B, S], after its last norm, which
        are `of_model` and `norm`; tokens [B, S]: those that follow.
        """
        pairs = torch.cat((self.embedding_norm(self.embed(tokens, pos)), self.hidden_norm(hidden)), -1)
        return self.layers(self.joined(pairs), pos, self.contexts(pos, cache), cache)
