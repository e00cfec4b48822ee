"""Train a DQN on CartPole at a high replay ratio, in a plain loop as CleanRL has it, and see its units die.

Three arms: nothing done, `remedy="auto"`, and layer normalisation before each ReLU instead.

pip install gymnasium
python examples/09_dqn.py --seeds 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from lightning_deadrelu import LivenessReport, watch

ARMS = ("no remedy", "auto", "layer norm")


class Memory:
    """The transitions seen so far, drawn from at random."""

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        self.before, self.after = torch.zeros(size, width), torch.zeros(size, width)
        self.actions = torch.zeros(size, dtype=torch.int64)
        self.rewards, self.ended = torch.zeros(size), torch.zeros(size)
        self.seen, self.generator = 0, generator

    def add(self, before: Any, action: int, reward: float, after: Any, ended: bool) -> None:
        place = self.seen % len(self.actions)
        self.before[place], self.after[place] = torch.as_tensor(before), torch.as_tensor(after)
        self.actions[place], self.rewards[place], self.ended[place] = action, reward, float(ended)
        self.seen += 1

    def sample(self, count: int) -> tuple[Tensor, ...]:
        rows = torch.randint(min(self.seen, len(self.actions)), (count,), generator=self.generator)
        return self.before[rows], self.actions[rows], self.rewards[rows], self.after[rows], self.ended[rows]


class Curves(NamedTuple):
    """What became of one run: the environment's step of each verdict, and of each episode's end with its return."""

    dead: list[tuple[int, float]]
    dormant: list[tuple[int, float]]
    returns: list[tuple[int, float]]

    def last(self, name: str) -> float:
        """Average the last tenth of a curve."""
        values = [value for _, value in getattr(self, name)]
        return float(np.mean(values[-max(1, len(values) // 10) :]))


def network(inputs: int, actions: int, layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((inputs, 120), (120, 84)):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if layer_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(84, actions))


def train(arm: str, seed: int, options: argparse.Namespace) -> Curves:
    """Run one arm."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    env = gymnasium.make("CartPole-v1")
    build = [network(4, 2, arm == "layer norm") for _ in range(2)]
    model, target = build
    target.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), options.lr)
    memory = Memory(10_000, 4, torch.Generator().manual_seed(seed))
    curves = Curves([], [], [])
    before, _ = env.reset(seed=seed)
    total = 0.0
    with watch(model, optimizer, min_samples=options.min_samples, remedy="auto" if arm == "auto" else None) as monitor:
        for step in range(options.steps):
            if random.random() < max(0.05, 1 - step / (0.2 * options.steps)):
                action = int(random.integers(2))
            else:
                with torch.no_grad():
                    action = int(model(torch.as_tensor(before)).argmax())
            after, reward, ended, truncated, _ = env.step(action)
            memory.add(before, action, float(reward), after, ended)
            before, total = after, total + float(reward)
            if ended or truncated:
                curves.returns.append((step, total))
                (before, _), total = env.reset(), 0.0
            for _ in range(options.replay_ratio if step >= 500 else 0):
                loss = error(model, target, memory.sample(128))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                note(monitor.step(loss), step, curves)
            if step % 200 == 0:
                target.load_state_dict(model.state_dict())
    return curves


def error(model: nn.Module, target: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    before, actions, rewards, after, ended = batch
    with torch.no_grad():
        wanted = rewards + 0.99 * (1 - ended) * target(after).amax(1)
    return nn.functional.mse_loss(model(before).gather(1, actions[:, None]).flatten(), wanted)


def note(report: LivenessReport | None, step: int, curves: Curves) -> None:
    if report is not None:
        curves.dead.append((step, report.dead_fraction))
        curves.dormant.append((step, report.fraction("dormant")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4_000, help="of the environment")
    parser.add_argument("--replay-ratio", type=int, default=4, help="optimizer steps per step of the environment")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--min-samples", type=int, default=2995)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="a folder for the curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Curves]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        for arm, runs in found.items():
            runs.append(train(arm, seed, options))
    print(f"\n{'arm':12}{'seed':>6}{'dead':>8}{'dormant':>9}{'return':>8}")
    for arm, runs in found.items():
        for seed, one in enumerate(runs):
            numbers = f"{one.last('dead'):8.1%}{one.last('dormant'):9.1%}{one.last('returns'):8.0f}"
            print(f"{arm:12}{seed:6}{numbers}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "dqn.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
