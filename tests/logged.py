"""What loggers get of ``toys.mlp``, and what an offline W&B run holds."""

import json
import subprocess
import sys
from pathlib import Path

FIRST = {"dead_fraction", "newly_dead_units", "revived_units", "at_risk_fraction"}
DETAILS = {
    "dead_units",
    "judged_fraction",
    "died_again_units",
    "rare_fraction",
    "always_on_fraction",
    "frozen_fraction",
    "dormant_fraction",
    "remedied_units",
    "useful_units",
}
SITES = ("net.1", "net.3")
KEYS = {f"dead_relu/{key}" for key in FIRST} | {f"dead_relu_details/{key}" for key in DETAILS}
KEYS |= {f"dead_relu_sites/{site}" for site in SITES}


def wandb_records(folder):
    """Read an offline run back."""
    (run,) = Path(folder).rglob("*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", run], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def as_wandb(metrics):
    return {key.replace(".", "_"): value for key, value in metrics.items()}
