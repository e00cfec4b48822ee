"""Promise 10 and 11 in a notebook: a fit ends well beside the default progress bar, and its outcome is seen once."""

import sys
import tempfile
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FIT = """
import logging, warnings
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_deadrelu import DeadReLUMonitor

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
torch.manual_seed(0)

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        torch.nn.init.constant_(self.net[0].bias[:3], -100.0)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

monitor = DeadReLUMonitor(every_n_steps=1, window=4, checkup=True, remedy="reset")
options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
trainer = Trainer(callbacks=[monitor, BAR], **options)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.rand(800, 4) - 0.5, 100))
"""


HTML = "assert '<table>' in monitor.summary()._repr_html_()"


def printed(*cells: str) -> list[str]:
    """Run cells in a kernel of their own, and return what each prints and shows as text."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()
    return ["".join(_text(output) for output in cell.outputs) for cell in book.cells]


def _text(output) -> str:
    return output.text if output.output_type == "stream" else output.data.get("text/plain", "")


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["RichProgressBar()", "TQDMProgressBar()"])
def test_a_fit_in_a_notebook_ends_with_its_outcome_once(bar):
    fitted, asked, shown, _ = printed(FIT.replace("BAR", bar), "print(monitor.summary())", "monitor.report", HTML)
    told = "None of 8 units is dead, down from"
    assert fitted.count(told) == fitted.count(f"\ndead_relu: {told}") == 1
    assert asked.startswith(told)
    assert f"dead_relu: {asked}" in fitted
    assert shown == "LivenessReport(step=15, 1 site, 0 of 8 units dead)"


TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def shown(book) -> list[set[str]]:
    """Say of each cell of code in which forms it shows something."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return [{kind for output in cell.outputs for kind in output.get("data", {"text": ""})} for cell in cells]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_kept_of_it(tmp_path):
    kept = nbformat.read(TOUR, 4)
    book = nbformat.read(TOUR, 4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert shown(book) == shown(kept)
    summary, plot = shown(kept)[4:6]
    assert "text/html" in summary
    assert "image/png" in plot


def test_the_notebook_that_is_kept_names_no_machine():
    here = (str(Path.home()), str(Path.cwd()), sys.prefix, tempfile.gettempdir(), "site-packages")
    assert not [place for place in here if place in TOUR.read_text(encoding="utf-8")]
