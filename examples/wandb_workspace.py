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

    shares = [f"{name}/{share}_fraction" for share in ("dead", "rare", "always_on", "frozen")]
    counts = [f"{name}/{count}_units" for count in ("newly_dead", "revived", "redied", "remedied")]
    curves = [
        line("Shares of units", *shares),
        line("Units in a window", *counts),
        line("Dead fraction of each site", metric_regex=f"{name}_sites/.*"),
    ]
    pictures = [panels.MediaBrowser(title="All sites", media_keys=[f"{name}_overview/sites"], num_columns=1)]
    sections = [
        workspaces.Section(name="Dead ReLU units", panels=curves, is_open=True),
        workspaces.Section(name="Dead ReLU rasters", panels=pictures, is_open=True),
    ]
    # generated panels: all else is shown below
    return workspaces.Workspace(entity, project, "Dead ReLU units", sections, auto_generate_panels=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(workspace_of(*sys.argv[1:]).save().url)
