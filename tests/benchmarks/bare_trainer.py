"""The Trainer of the benchmarks: on a CPU unless asked otherwise, without a logger, files or a progress bar."""

from typing import Any

from lightning.pytorch import Callback, Trainer


def bare_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Make one with these callbacks and options of :class:`~lightning.pytorch.Trainer`."""
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", **bare, **options}, callbacks=list(callbacks))
