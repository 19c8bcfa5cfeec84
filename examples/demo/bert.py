"""A BERT small enough to learn within a minute: an encoder, and the head to pretrain it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

# Short: which position is the neighbour must be learned before a neighbour can say anything, and
# with 128 positions the loss was still that of word frequencies after 200 steps.
CONTEXT = 32
WIDTH = 256


def encoder(vocab: int) -> BertModel:
    """Two layers with random weights. No dropout: the demo's runs are shorter than an epoch."""
    config = BertConfig(
        vocab_size=vocab, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=4 * WIDTH, max_position_embeddings=CONTEXT, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


class MaskedLM(nn.Module):
    """The encoder below BERT's head: a transform, the word embeddings once more, and a bias."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.encoder = encoder(vocab)
        self.transform = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.bias = nn.Parameter(torch.zeros(vocab))

    @property
    def weight(self) -> Tensor:
        """The head's, tied to the embedding."""
        return self.encoder.embeddings.word_embeddings.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, time) -> what the head multiplies, (batch, time, width)."""
        return self.transform(self.encoder(ids).last_hidden_state)
