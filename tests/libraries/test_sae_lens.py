"""SAELens's own autoencoders, trained as its trainer trains them: the latents watched are those that it counts."""

import pytest
import torch

from lightning_deadrelu import watch

saes = pytest.importorskip("sae_lens.saes", reason="sae-lens is large, and not among the tests' packages")
pytestmark = pytest.mark.slow
SIZES = {"d_in": 16, "d_sae": 64, "device": "cpu"}
KINDS = {
    "topk": lambda: saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(k=4, **SIZES)),
    "batch_topk": lambda: saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(k=4, **SIZES)),
    "jumprelu": lambda: saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**SIZES)),
}
BATCHES = torch.randn(300, 32, 16, generator=torch.Generator().manual_seed(1))


def steps(kind, batches, bias=-30.0, lr=1e-3):
    """Train with the first eight latents dead, and hand over model, optimizer and latents after each step."""
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        model.b_enc[:8] = bias
    optimizer = torch.optim.Adam(model.parameters(), lr)
    since_fired = torch.zeros(64)
    yield model, optimizer, None
    for number, batch in enumerate(batches):
        given = TrainStepInput(batch, {"l0": 0.01}, since_fired > 5, number, is_logging_step=False)
        done = model.training_forward_pass(given)
        done.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fired = done.feature_acts.detach().bool()
        since_fired = torch.where(fired.any(0), 0, since_fired + 1)
        yield model, optimizer, fired


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_sae_lens_counts(kind):
    plain = [model for model, _, _ in steps(kind, BATCHES[:24])][-1]
    run = steps(kind, BATCHES[:24])
    model, optimizer, _ = next(run)
    latents = []
    with watch(model, optimizer, every_n_steps=1, window=12, min_samples=300) as monitor:
        for _, _, fired in run:
            latents.append(fired)
            monitor.step()
    assert monitor.failure is None
    (site,) = monitor.report.sites
    assert site.kind == kind
    assert site.fired.long().equal(torch.cat(latents[12:]).sum(0))
    backwards = torch.cat(latents).flip(0)
    age = torch.where(backwards.any(0), 32 * (torch.stack(latents).any(1).flip(0).long().argmax(0)), 24 * 32)
    assert site.age.equal(age)
    assert site.dead.equal(age >= 300)
    assert site.dead[:8].all()
    watched = model.state_dict()
    assert all(value.equal(watched[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("remedy", "revived"), [(None, 0), ("auto", 8)])
def test_dead_latents_come_back(remedy, revived):
    run = steps("jumprelu", BATCHES, bias=-1.0, lr=3e-3)
    model, optimizer, _ = next(run)
    back = torch.zeros(64, dtype=torch.bool)
    settings = {"every_n_steps": 2, "window": 5, "min_samples": 100, "threshold": 0.0, "remedy": remedy}
    with watch(model, optimizer, **settings) as monitor:
        for _, _, fired in run:
            monitor.step()
            back |= fired.any(0)
    assert monitor.failure is None
    assert int(back[:8].sum()) == revived, monitor.events
