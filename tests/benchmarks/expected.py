"""Warnings that the runs of a benchmark are expected to give; any other is shown."""

import warnings

MESSAGES = (
    "dead_relu: ",  # deaths and refusals are what is measured
    ".*does not have many workers",
    ".*LeafSpec.*is deprecated",
    ".*use of fork",
    "The number of training batches",
    ".*was called without a model",  # a run that goes on, killed before its first checkpoint
    ".*there is no last checkpoint available",
    "You defined a `validation_step` but have no `val_dataloader`",
    "Checkpoint directory .* exists and is not empty",
)


def ignore_expected() -> None:
    """Show none of them."""
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message)
