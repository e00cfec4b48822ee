"""A small model of each library, trained by the library's own code, or by Lightning where it brings none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from libraries.harness import Library
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Regression(LightningModule):
    """Fits a module that stands alone to a target."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit(net: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], options: Any) -> None:
    Trainer(max_epochs=1, **options).fit(Regression(net, loss), batches)


def chemprop(steps: int, options: dict[str, Any]) -> None:
    """A message-passing network for molecules; chemprop's own LightningModule."""
    from chemprop import data, models, nn

    molecules = ["".join(random.choices("CNOS", k=random.randint(2, 9))) for _ in range(8 * steps)]
    points = [data.MoleculeDatapoint.from_smi(smiles, [float(smiles.count("N"))]) for smiles in molecules]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=8, num_workers=0, shuffle=False)
    head = nn.RegressionFFN(input_dim=32, hidden_dim=32)
    model = models.MPNN(nn.BondMessagePassing(d_h=32, bias=True), nn.MeanAggregation(), head)
    Trainer(max_steps=steps, **options).fit(model, loader)


def torch_geometric(steps: int, options: dict[str, Any]) -> None:
    """A graph isomorphism network with batch norms on random graphs."""
    from torch_geometric import loader
    from torch_geometric.data import Data
    from torch_geometric.nn import GIN, global_add_pool

    def graph() -> Data:
        nodes, edges = torch.randn(10, 5), torch.randint(10, (2, 30))
        return Data(x=nodes, edge_index=edges, y=nodes.mean()[None, None])

    def loss(net: nn.Module, batch: Any) -> Tensor:
        nodes = net.body(batch.x, batch.edge_index)
        return nn.functional.mse_loss(net.head(global_add_pool(nodes, batch.batch)), batch.y)

    net = nn.Module()
    net.body, net.head = GIN(5, 16, 3, norm="batch_norm"), nn.Linear(16, 1)
    fit(net, loader.DataLoader([graph() for _ in range(8 * steps)], batch_size=8), loss, options)


def x_transformers(steps: int, options: dict[str, Any]) -> None:
    """A language model with squared ReLU in its feed-forward layers."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, ff_relu_squared=True, ff_no_bias=False)
    net = AutoregressiveWrapper(TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers))
    fit(net, DataLoader(torch.randint(20, (8 * steps, 16)), batch_size=8), lambda net, batch: net(batch), options)


def gluonts(steps: int, options: dict[str, Any]) -> None:
    """A feed-forward forecaster, trained by GluonTS' estimator."""
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import SimpleFeedForwardEstimator

    series = [{"start": pd.Period("2026-01-01", "D"), "target": torch.randn(100).cumsum(0).numpy()} for _ in range(8)]
    trainer = {"max_epochs": 1, **options}
    estimator = SimpleFeedForwardEstimator(
        4, context_length=8, hidden_dimensions=[20, 20], num_batches_per_epoch=steps, trainer_kwargs=trainer
    )
    estimator.train(ListDataset(series, freq="D"))


def pytorch_forecasting(steps: int, options: dict[str, Any]) -> None:
    """N-HiTS on random walks; the library's own LightningModule."""
    import pandas as pd
    from pytorch_forecasting import NHiTS, TimeSeriesDataSet

    table = pd.DataFrame({"time": list(range(40)) * 8, "series": [str(i) for i in range(8) for _ in range(40)]})
    table["value"] = torch.randn(8, 40).cumsum(1).flatten().numpy()
    data = TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )
    model = NHiTS.from_dataset(data, hidden_size=32, learning_rate=1e-3)
    Trainer(max_steps=steps, **options).fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))


def scvi(steps: int, options: dict[str, Any]) -> None:
    """A variational autoencoder for single-cell counts, trained by scvi-tools."""
    import anndata
    from scvi import settings
    from scvi.model import SCVI

    settings.seed = 3
    cells = anndata.AnnData(torch.poisson(torch.full((320, 30), 3.0)).numpy())
    SCVI.setup_anndata(cells)
    model = SCVI(cells, n_hidden=32, n_latent=4)
    model.train(max_epochs=steps // 20, train_size=1.0, batch_size=16, **options)


def neuralforecast(steps: int, options: dict[str, Any]) -> None:
    """An MLP forecaster, trained by neuralforecast, which copies the callbacks."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import MLP

    days = pd.date_range("2026-01-01", periods=100)
    table = pd.concat([pd.DataFrame({"unique_id": str(i), "ds": days}) for i in range(8)])
    table["y"] = torch.randn(8, 100).cumsum(1).flatten().numpy()
    model = MLP(h=4, input_size=8, hidden_size=32, num_layers=2, max_steps=steps, windows_batch_size=32, **options)
    NeuralForecast([model], freq="D").fit(table)


def monai(steps: int, options: dict[str, Any]) -> None:
    """A residual U-Net with batch norms that segments random images."""
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet

    net = UNet(2, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, act="RELU", norm="BATCH")
    dice = DiceLoss(sigmoid=True)

    def loss(net: nn.Module, images: Tensor) -> Tensor:
        return dice(net(images), (images > 0.5).float())

    fit(net, DataLoader(torch.randn(8 * steps, 1, 16, 16), batch_size=8), loss, options)


def pytorch_metric_learning(steps: int, options: dict[str, Any]) -> None:
    """An embedding under a triplet loss, which itself rectifies distances."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    net = nn.Module()
    net.embed = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    net.triplet = TripletMarginLoss(margin=0.2)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net.triplet(net.embed(batch), (batch[:, 0] > 0).long())

    fit(net, DataLoader(torch.randn(32 * steps, 8), batch_size=32), loss, options)


def sae_lens(steps: int, options: dict[str, Any]) -> None:
    """A sparse autoencoder of SAELens on random activations."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    net = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=16, d_sae=64, device="cpu"))

    def loss(net: Any, x: Tensor) -> Tensor:
        code = net.encode(x)
        return (net.decode(code) - x).pow(2).mean() + 1e-3 * code.sum(-1).mean()

    fit(net, DataLoader(torch.randn(32 * steps, 16), batch_size=32), loss, options)


def pytorch_tabular(steps: int, options: dict[str, Any]) -> None:
    """A category-embedding MLP, trained by PyTorch Tabular."""
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    table = pd.DataFrame(torch.randn(16 * steps, 6).numpy(), columns=list("abcdef"))
    table["y"] = table["a"] - table["b"]
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=list("abcdef")),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="32-16", activation="ReLU"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=16,
            max_epochs=1,
            accelerator=options["accelerator"],
            progress_bar="none",
            checkpoints=None,
            early_stopping=None,
            load_best=False,
            trainer_kwargs={"default_root_dir": options["default_root_dir"], "limit_val_batches": 0},
        ),
        verbose=False,
        suppress_lightning_logger=False,
    )
    model.fit(train=table, validation=table[:32], callbacks=options["callbacks"], seed=3)


_UNIT = "net.model.0.conv.unit0.adn"
_ENCODER = "module.z_encoder.encoder.fc_layers"
_FORWARD = "net.net.attn_layers.layers.1.1.ff.0"
_MLP = "_backbone.linear_layers"
_BLOCK = "model.blocks.0.layers.layers"
LIBRARIES = (
    Library("chemprop", "message passing", chemprop, "predictor.ffn.0.0.bias", "predictor.ffn.1.0"),
    Library("torch-geometric", "GIN", torch_geometric, "net.body.convs.0.nn.norms.0.module.bias", "net.body.act"),
    Library("pytorch-forecasting", "N-HiTS", pytorch_forecasting, f"{_BLOCK}.0.bias", f"{_BLOCK}.1"),
    Library("scvi-tools", "SCVI", scvi, f"{_ENCODER}.Layer 0.1.bias", f"{_ENCODER}.Layer_0.3"),
    Library("gluonts", "feed-forward forecaster", gluonts, "model.nn.0.bias", "model.nn.1"),
    Library("neuralforecast", "MLP", neuralforecast, "mlp.0.bias", "relu"),
    Library("pytorch-tabular", "category embedding MLP", pytorch_tabular, f"{_MLP}.0.bias", f"{_MLP}.1"),
    Library("monai", "residual U-Net", monai, f"{_UNIT}.N.bias", f"{_UNIT}.A"),
    Library("x-transformers", "decoder, squared ReLU", x_transformers, f"{_FORWARD}.0.bias", f"{_FORWARD}.1-relu"),
    Library("sae-lens", "sparse autoencoder", sae_lens, "net.b_enc", "net.activation_fn"),
    Library("pytorch-metric-learning", "triplet loss", pytorch_metric_learning, "net.embed.0.bias", "net.embed.1"),
)
