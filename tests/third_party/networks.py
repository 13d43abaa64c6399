"""Networks of Hugging Face's transformers and of timm as people fine-tune them: small ones, drawn at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

timm, hf = pytest.importorskip("timm"), pytest.importorskip("transformers")

WORDS = 60
_SIZE = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_DISTIL = {"vocab_size": WORDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
_APART = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
_VIT = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
_CLASSES, _LM, _SEQ2SEQ = (
    hf.AutoModelForSequenceClassification,
    hf.AutoModelForCausalLM,
    hf.AutoModelForSeq2SeqLM,
)


class Text(L.LightningModule):
    """Calls its network by keywords, attention mask and labels among them, and takes the loss that comes back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        makes_text = isinstance(net, hf.PreTrainedModel) and net.get_output_embeddings() is not None
        self.labels = "input_ids" if makes_text else "labels"

    def answer(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the network says of a batch, and the loss."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        out = self.net(**given, labels=batch[self.labels])
        return out.logits, out.loss

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.answer(batch)[1]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.answer(batch)[1].float())
        self.log("falls", -float(self.trainer.current_epoch))  # so that each set stays

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Image(Text):
    """Calls its network with images."""

    def answer(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.net(batch["images"].to(next(self.parameters()).dtype))
        return logits, F.cross_entropy(logits, batch["labels"])


@dataclass(frozen=True)
class Network:
    """How one is made, and where things of it are.

    Attributes:
        make: the network, ``net`` in the LightningModule.
        around: modules that shared dendrites can hang around.
        head: modules that are trained beside what grows; none: nothing but the backbone.
        unused: names of layers that get no dendrites.
        sees: what it is called with.
    """

    make: Callable[[], nn.Module]
    around: Sequence[str]
    head: Sequence[str] = ()
    unused: Sequence[str] = ()
    sees: Literal["words", "images"] = "words"

    def module(self, frozen_whole: bool = False, training: bool = False) -> Text:
        """With the same weights each time; frozen, apart from the head."""
        torch.manual_seed(0)
        net = self.make()
        model = Text(net) if self.sees == "words" else Image(net)
        model.requires_grad_(False).train(training)
        for name in () if frozen_whole else self.head:
            model.get_submodule(name).requires_grad_(True)
        return model

    def data(self) -> DataLoader:
        """Two batches: token ids with their masks, or images."""
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(16) % 2
        if self.sees == "words":
            ids = torch.randint(3, WORDS, (16, 9), generator=generator)
            mask = (torch.arange(9) < torch.randint(4, 10, (16, 1), generator=generator)).long()
            columns = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
        else:
            columns = {"images": torch.randn(16, 3, 32, 32, generator=generator), "labels": labels}
        return DataLoader([{name: column[i] for name, column in columns.items()} for i in range(16)], 8)


def _text(auto: Any, config: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: auto.from_config(config, **kwargs)


def _image(name: str, around: Sequence[str], head: str, unused: Sequence[str] = (), **kwargs: Any) -> Network:
    def make() -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=2, **kwargs)

    return Network(make, around, [head], unused, "images")


_KEYS = {"num_key_value_heads": 1}
NETWORKS = {
    "BERT": Network(
        _text(_CLASSES, hf.BertConfig(**_SIZE)),
        ["net.bert.encoder.layer.0", "net.bert.encoder.layer.1.attention.output.dense"],
        ["net.classifier"],
    ),
    "RoBERTa": Network(
        _text(_CLASSES, hf.RobertaConfig(**_SIZE), attn_implementation="eager"),
        ["net.roberta.encoder.layer.1"],
        ["net.classifier"],
    ),
    "DistilBERT": Network(
        _text(_CLASSES, hf.DistilBertConfig(**_DISTIL, pad_token_id=0)),
        ["net.distilbert.transformer.layer.1"],
        ["net.pre_classifier", "net.classifier"],
    ),
    "ALBERT": Network(
        _text(_CLASSES, hf.AlbertConfig(**_SIZE, embedding_size=8)), ["net.albert.encoder"], ["net.classifier"]
    ),
    "DeBERTa-v2": Network(
        _text(_CLASSES, hf.DebertaV2Config(**_SIZE, **_APART)), ["net.deberta.encoder.layer.1"], ["net.classifier"]
    ),
    "GPT-2, classes": Network(_text(_CLASSES, hf.GPT2Config(**_GPT2, **_ENDS)), ["net.transformer.h.1"], ["net.score"]),
    "GPT-2, text": Network(_text(_LM, hf.GPT2Config(**_GPT2, **_ENDS)), ["net.transformer.h.1.mlp"]),
    "Llama": Network(_text(_LM, hf.LlamaConfig(**_SIZE, **_KEYS)), ["net.model.layers.1"]),
    "Llama, tied": Network(
        _text(_LM, hf.LlamaConfig(**_SIZE, **_KEYS, tie_word_embeddings=True)), ["net.model.layers.0.self_attn"]
    ),
    "Qwen2, classes": Network(
        _text(_CLASSES, hf.Qwen2Config(**_SIZE, **_KEYS)), ["net.model.layers.1.mlp"], ["net.score"]
    ),
    "Qwen3": Network(_text(_LM, hf.Qwen3Config(**_SIZE, **_KEYS, head_dim=8)), ["net.model.layers.1"]),
    "T5": Network(
        _text(
            _SEQ2SEQ,
            hf.T5Config(
                vocab_size=WORDS,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                eos_token_id=2,
            ),
        ),
        ["net.encoder.block.1"],
    ),
    "Mamba": Network(
        _text(_LM, hf.MambaConfig(vocab_size=WORDS, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0)),
        ["net.backbone.layers.1"],
        unused=[f"net.backbone.layers.{n}.mixer.{name}" for n in (0, 1) for name in ("conv1d", "dt_proj")],
    ),
    "ViT": _image("vit_tiny_patch16_224", ["net.blocks.1", "net.head"], "net.head", **_VIT),
    "BEiT": _image(
        "beit_base_patch16_224",
        ["net.blocks.1"],
        "net.head",
        unused=["net.blocks.0.attn.qkv", "net.blocks.1.attn.qkv"],
        **_VIT,
    ),
    "Swin": _image("swin_tiny_patch4_window7_224", ["net.layers.0.blocks.1.mlp"], "net.head.fc", **_SWIN),
    "ConvNeXt": _image("convnext_atto", ["net.head.fc"], "net.head.fc", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    # Random weights of a residual branch begin with a zero, behind which there is no error.
    "ResNet": _image("resnet10t", ["net.fc"], "net.fc", zero_init_last=False, channels=(8, 8, 16, 16), stem_width=8),
    "EfficientNet": _image("test_efficientnet", ["net.classifier"], "net.classifier"),
}


def counted(layers: Mapping[str, nn.Module]) -> str:
    """Layers by their types, as the guide lists them."""
    kinds = Counter(type(layer).__name__ for layer in layers.values())
    return ", ".join(f"{count} `{kind}`" for kind, count in sorted(kinds.items()))
