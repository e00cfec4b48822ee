"""Save a Weights & Biases view that shows the monitor's curves and rasters first.

The curves appear without it; this saves the clicks that arrange them. It needs a login and ``pip install
wandb-workspaces``: ``python examples/wandb_workspace.py ENTITY PROJECT``.
"""

from __future__ import annotations

import sys
from typing import Any


def workspace_of(entity: str, project: str, name: str = "dead_relu") -> Any:
    """Build the view, and save nothing.

    Args:
        entity: A user or a team.
        project: One of its projects.
        name: The monitor's ``name``.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def line(title: str, *keys: str, **options: Any) -> Any:
        return panels.LinePlot(title=title, x="trainer/global_step", y=list(keys), **options)

    changes = f"{name}/newly_dead_units", f"{name}/revived_units"
    shares = [f"{name}_details/{share}_fraction" for share in ("rare", "always_on", "frozen", "dormant")]
    counts = [f"{name}_details/{count}_units" for count in ("dead", "died_again", "remedied")]
    curves = [
        line("Dead units", f"{name}/dead_fraction", f"{name}/at_risk_fraction"),
        line("Died and revived in a window", *changes),
        line("Dead units of each layer", metric_regex=f"{name}_sites/.*"),
    ]
    pictures = [panels.MediaBrowser(title="All layers", media_keys=[f"{name}_overview/sites"], num_columns=1)]
    sections = [
        workspaces.Section(name="Dead ReLU units", panels=curves, is_open=True),
        workspaces.Section(name="Dead ReLU pictures", panels=pictures, is_open=True),
        workspaces.Section(name="Dead ReLU details", panels=[line("Other shares", *shares), line("Units", *counts)]),
    ]
    # generated panels: all else is shown below
    return workspaces.Workspace(entity, project, "Dead ReLU units", sections, auto_generate_panels=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(workspace_of(*sys.argv[1:]).save().url)
