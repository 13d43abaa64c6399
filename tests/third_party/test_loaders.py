"""Models of other libraries grow, are saved as those do it, and come back in their own way within ``growing()``.

Run by ``make test-loaders``, which installs the libraries into an environment of their own. Each test is left out where
its library is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from pl_dendrites import DendriteCallback, attach, growing, load_from_checkpoint
from tests.models import QUIET, quick

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Falls(L.Callback):
    """A score that gets better with each epoch, so that each set of dendrites stays."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("falls", -float(trainer.current_epoch))


def two_cycles() -> tuple[DendriteCallback, L.Callback]:
    return quick("falls"), Falls()


def has_grown(growth: Sequence[Any], model: nn.Module) -> dict[str, Tensor]:
    """What a model that went through two cycles holds; all its output weights count."""
    assert growth[0].num_dendrites == 2
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    assert any(value.abs().sum() > 0 for key, value in state.items() if ".dendrites.0.weights." in key)
    return state


def is_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    flags = {key: value.requires_grad for key, value in model.named_parameters() if ".dendrites." in key}
    assert all(flag == (".weights." in key) for key, flag in flags.items())


@pytest.fixture(autouse=True)
def _fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some leave files where they run
    torch.manual_seed(0)


# -- chemprop ----------------------------------------------------------------------------------------------------------


def test_chemprop(tmp_path: Path) -> None:
    chemprop = pytest.importorskip("chemprop")
    from chemprop.models import MPNN, load_model, save_model

    smiles = ["C" * n + end for n in range(1, 9) for end in ("", "O", "N", "Cl")]
    points = [chemprop.data.MoleculeDatapoint.from_smi(s, [float(len(s) % 3)]) for s in smiles]
    data = chemprop.data.build_dataloader(chemprop.data.MoleculeDataset(points), batch_size=16, shuffle=False)
    message = chemprop.nn.BondMessagePassing(d_h=8, depth=2)
    head = chemprop.nn.RegressionFFN(input_dim=8, hidden_dim=8)
    model, growth = MPNN(message, chemprop.nn.MeanAggregation(), head, batch_norm=False), two_cycles()
    trainer = L.Trainer(max_epochs=-1, callbacks=[*growth], **QUIET)
    trainer.fit(model, data, data)
    state = has_grown(growth, model)
    batch = next(iter(data))

    def out(of: Any) -> Tensor:
        return of.eval()(batch.bmg)

    save_model(tmp_path / "model.pt", model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with growing():
        loaded = [
            MPNN.load_from_file(tmp_path / "model.pt"),
            MPNN.load_from_file(tmp_path / "model.pt", strict=False),
            MPNN.load_from_checkpoint(tmp_path / "model.ckpt"),
            load_model(tmp_path / "model.pt", multicomponent=False),
        ]
    for again in loaded:
        is_same(again, state)
        assert torch.equal(out(again), out(model))


# -- darts -------------------------------------------------------------------------------------------------------------


def test_darts(tmp_path: Path) -> None:
    pytest.importorskip("darts")
    import numpy as np
    from darts import TimeSeries
    from darts.models import NBEATSModel, RNNModel

    series = TimeSeries.from_values(np.sin(np.arange(60, dtype=np.float32))[:, None])
    common = {"n_epochs": 60, "batch_size": 32, "random_state": 0, "save_checkpoints": True, "work_dir": str(tmp_path)}
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (NBEATSModel, {"output_chunk_length": 2, "num_stacks": 1, "num_blocks": 1, "num_layers": 1, "layer_widths": 8}),
        (RNNModel, {"training_length": 8, "hidden_dim": 6}),
    ]
    for kind, arguments in kinds:
        growth, name = two_cycles(), kind.__name__
        kwargs = {"callbacks": [*growth], **{key: value for key, value in QUIET.items() if "check" not in key}}
        made = kind(input_chunk_length=4, model_name=name, pl_trainer_kwargs=kwargs, **arguments, **common)
        made.fit(series, val_series=series)
        state, expected = has_grown(growth, made.model), made.predict(3).values()
        made.save(str(tmp_path / f"{name}.pt"))
        with growing():
            again = kind.load(str(tmp_path / f"{name}.pt"), pl_trainer_kwargs={"accelerator": "cpu"}, trusted=True)
            last = kind.load_from_checkpoint(name, work_dir=str(tmp_path), best=False, trusted=True)
        is_same(again.model, state)
        assert np.array_equal(again.predict(3).values(), expected)
        assert any(".dendrites." in key for key in last.model.state_dict())


# -- pytorch-forecasting -----------------------------------------------------------------------------------------------


def test_pytorch_forecasting(tmp_path: Path) -> None:
    forecasting = pytest.importorskip("pytorch_forecasting")
    import numpy as np
    import pandas as pd

    steps = np.arange(60)
    frame = pd.DataFrame({"t": steps, "value": np.sin(steps).astype("float32"), "series": "a"})
    data = forecasting.TimeSeriesDataSet(
        frame,
        "t",
        "value",
        ["series"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_unknown_reals=["value"],
    )
    batches = data.to_dataloader(train=False, batch_size=32)
    sizes = {"hidden_size": 6, "attention_head_size": 1, "hidden_continuous_size": 4}
    for kind, arguments in ((forecasting.NHiTS, {"hidden_size": 8}), (forecasting.TemporalFusionTransformer, sizes)):
        model, growth = kind.from_dataset(data, learning_rate=0.01, **arguments), two_cycles()
        trainer = L.Trainer(max_epochs=-1, callbacks=[*growth], **QUIET)
        trainer.fit(model, batches, batches)
        state = has_grown(growth, model)
        path = tmp_path / f"{kind.__name__}.ckpt"
        trainer.save_checkpoint(path)
        with growing():
            again = kind.load_from_checkpoint(path, weights_only=False)
        is_same(again, state)
        x = next(iter(batches))[0]
        assert torch.equal(again.eval()(x)["prediction"], model.eval()(x)["prediction"])
        is_same(load_from_checkpoint(kind, path, weights_only=False), state)


# -- neuralforecast ----------------------------------------------------------------------------------------------------


def test_neuralforecast(tmp_path: Path) -> None:
    pytest.importorskip("neuralforecast")
    import numpy as np
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import LSTM, MLP

    steps = np.arange(80)
    frame = pd.DataFrame({"unique_id": "a", "ds": steps, "y": np.sin(steps).astype("float32")})
    settings = {"h": 2, "input_size": 6, "max_steps": 200, "val_check_steps": 2, "accelerator": "cpu", "logger": False}
    settings |= {"enable_progress_bar": False}
    models = [
        MLP(hidden_size=8, num_layers=1, callbacks=[*two_cycles()], **settings),
        LSTM(encoder_hidden_size=6, decoder_hidden_size=6, callbacks=[*two_cycles()], **settings),
    ]
    made = NeuralForecast(models=models, freq=1)
    made.fit(frame, val_size=10)
    # What was given was copied.
    states = {type(model): has_grown(model.trainer_kwargs["callbacks"], model) for model in made.models}
    expected = made.predict()
    made.save(str(tmp_path / "saved"), overwrite=True)
    with growing():
        again = NeuralForecast.load(str(tmp_path / "saved"))
    for model in again.models:
        is_same(model, states[type(model)])
    pd.testing.assert_frame_equal(again.predict()[expected.columns], expected, check_exact=True)


# -- scvi-tools --------------------------------------------------------------------------------------------------------


def test_scvi(tmp_path: Path) -> None:
    scvi = pytest.importorskip("scvi")
    import numpy as np
    from anndata import AnnData

    counts = np.random.default_rng(0).poisson(2.0, (64, 12)).astype("float32")
    cells = AnnData(counts)
    cells.obs["kind"] = ["a", "b"] * 32
    scvi.model.SCVI.setup_anndata(cells, labels_key="kind")
    made, growth = scvi.model.SCVI(cells, n_hidden=8, n_latent=3), two_cycles()
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "check_val_every_n_epoch": 1}
    made.train(max_epochs=100, batch_size=32, callbacks=[*growth], **settings)
    state, expected = has_grown(growth, made.module), made.get_latent_representation()
    made.save(str(tmp_path / "saved"))
    with growing():
        again = scvi.model.SCVI.load(str(tmp_path / "saved"), cells, accelerator="cpu")
        labelled = scvi.model.SCANVI.from_scvi_model(again, unlabeled_category="?")
    is_same(again.module, state)
    labelled.is_trained_ = True  # or it says nothing
    labelled.module.eval()
    assert np.array_equal(again.get_latent_representation(), expected)
    assert np.array_equal(labelled.get_latent_representation(), expected)


# -- transformers ------------------------------------------------------------------------------------------------------


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
TOKENS = torch.arange(8)[None]


class Wrapped(L.LightningModule):
    """A model of transformers in a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[1]).loss
        self.log("val_loss" if not self.training else "train_loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from torch.utils.data import DataLoader, TensorDataset

    whole = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    words = torch.randint(50, (32, 8))
    batches, growth = DataLoader(TensorDataset(words, words[:, 0] % 2), 16), two_cycles()
    L.Trainer(max_epochs=-1, callbacks=[*growth], **QUIET).fit(Wrapped(whole), batches, batches)
    state, expected = has_grown(growth, whole.eval()), whole(TOKENS).logits
    whole.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "several", max_shard_size="20kB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    for folder in ("one", "several"):
        for settings in ({}, {"device_map": "cpu"}, {"dtype": torch.float32}):
            with growing():
                again = type(whole).from_pretrained(tmp_path / folder, **settings)
            is_same(again, state)
            assert torch.equal(again(TOKENS).logits, expected)
        with growing():
            part = transformers.AutoModel.from_pretrained(tmp_path / folder)
        is_same(part, {key: value for key, value in whole.bert.state_dict().items()})
        part.save_pretrained(tmp_path / "part")
        with growing():
            again = type(whole).from_pretrained(tmp_path / "part")
        is_same(again.bert, part.state_dict())
    assert transformers.PreTrainedModel._load_pretrained_model.__module__ == "transformers.modeling_utils"


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM", "ViTForImageClassification", "CLIPModel"])
def test_transformers_of_other_kinds(kind: str, tmp_path: Path) -> None:
    """A transposed Linear, tied weights, names that are others in the file, two models in one."""
    transformers = pytest.importorskip("transformers")
    own = {"vision_config": {**TINY, "image_size": 8, "patch_size": 4}, "text_config": TINY} if "CLIP" in kind else TINY
    if "ViT" in kind:
        own = {**TINY, "image_size": 8, "patch_size": 4}
    if "GPT2" in kind:
        own = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    made = getattr(transformers, kind)
    model = made(made.config_class(**own)).eval()
    network = attach(model)
    network.grow(list(network.layers))
    network.grow(list(network.layers))
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    with growing():
        again = made.from_pretrained(tmp_path)
    is_same(again, dict(model.state_dict()))


def test_two_threads_load_from_pretrained_and_one_alone_grows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    network = attach(model)
    network.grow(list(network.layers))
    model.save_pretrained(tmp_path)
    with growing(), ThreadPoolExecutor() as pool:
        plain = pool.submit(transformers.BertModel.from_pretrained, tmp_path)
        again = transformers.BertModel.from_pretrained(tmp_path)
        assert not any(".dendrites." in key for key in plain.result().state_dict())
    is_same(again, dict(model.state_dict()))


# -- pytorch-tabular ---------------------------------------------------------------------------------------------------


def test_pytorch_tabular(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_tabular")
    import numpy as np
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    values = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    frame = pd.DataFrame(values, columns=list("abcd")).assign(y=values[:, 0] * values[:, 1])
    quiet = {"accelerator": "cpu", "progress_bar": "none", "checkpoints": None, "early_stopping": None}
    made = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=list("abcd"), num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="8-4"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(max_epochs=60, batch_size=16, load_best=False, trainer_kwargs={}, **quiet),
        verbose=False,
        suppress_lightning_logger=True,
    )
    growth = two_cycles()
    made.fit(train=frame, validation=frame, callbacks=[*growth], seed=0)
    state, expected = has_grown(growth, made.model), made.predict(frame)
    made.save_model(str(tmp_path / "saved"))
    with growing():
        again = TabularModel.load_model(str(tmp_path / "saved"))
    is_same(again.model, state)
    pd.testing.assert_frame_equal(again.predict(frame), expected, check_exact=True)
