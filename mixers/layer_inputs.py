"""What each layer takes of a token beside the stream of the model (Gemma 3n). args: a `model.ModelArgs`."""

import torch
import torch.nn as nn
from torch import Tensor

from mixers.activations import ACTIVATIONS
from mixers.norms import RMSNorm


class LayerInputs(nn.Module):
    """An embedding of the token for each layer, plus what a projection of the model's own embedding gives it."""

    def __init__(self, args):
        super().__init__()
        self.size, n_number = args.layer_input_size, args.n_layer * args.layer_input_size
        self.embeddings = nn.Embedding(args.vocab_size, n_number, _weight=torch.empty(args.vocab_size, n_number))
        self.projection = nn.Linear(args.dim, n_number, bias=False)
        self.norm = RMSNorm(self.size, args)

    def forward(self, tokens: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """tokens [B, S] and their embeddings x [B, S, dim] -> for each layer, [B, S, size]."""
        own = (self.embeddings(tokens) * self.size**0.5).unflatten(-1, (-1, self.size))
        of_model = self.norm((self.projection(x) * x.shape[-1] ** -0.5).unflatten(-1, (-1, self.size)))
        return ((of_model + own) * 2**-0.5).unbind(2)


class LayerInput(nn.Module):
    """Adds to the stream what its gate lets through of a layer's input."""

    def __init__(self, args):
        super().__init__()
        self.activation = ACTIVATIONS[args.activation]
        self.gate = nn.Linear(args.dim, args.layer_input_size, bias=False)
        self.projection = nn.Linear(args.layer_input_size, args.dim, bias=False)
        self.norm = RMSNorm(args.dim, args)

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        """x [B, S, dim] and the layer's input own [B, S, size] -> [B, S, dim]."""
        return x + self.norm(self.projection(self.activation(self.gate(x), own)))
