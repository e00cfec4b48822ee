"""Promise 9: what makes no sense is refused, at once where it can be, and the message says what would work."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toys import EVERYTHING, Net, batches, fit, watchers

from lightning_deadrelu import DeadReLUMonitor

REFUSED = [
    ({"every_n_steps": 0}, "every_n_steps=0.*whole number of at least 1.*Try `every_n_steps=10`"),
    ({"every_n_steps": -1}, "every_n_steps=-1"),
    ({"every_n_steps": True}, "every_n_steps=True"),
    ({"every_n_steps": 2.0}, "every_n_steps=2.0"),
    ({"window": 0}, "window=0.*Try `window=10`"),
    ({"window": True}, "window=True"),
    ({"min_samples": 0}, "min_samples=0.*Try `min_samples=299`"),
    ({"min_samples": None}, "min_samples=None"),
    ({"gradient_evidence": 1}, "gradient_evidence=1.*a switch"),
    ({"gradient_evidence": True, "mask": len}, "gradient_evidence=True.*padding"),
    ({"threshold": 1.5}, "threshold=1.5.*from 0 to 1.*Try `threshold=0.1`"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"tau": 2}, "tau=2.*Try `tau=0.025`"),
    ({"tau": True}, "tau=True"),
    ({"include": "encoder.*"}, r"include='encoder\.\*'.*list of patterns.*Try `include=\['encoder\.\*'\]`"),
    ({"exclude": "relu"}, "exclude='relu'.*list of patterns"),
    ({"include": [3]}, r"include=\[3\].*list of patterns"),
    ({"include": None}, "include=None.*list of patterns"),
    ({"name": "dead/relu"}, "name='dead/relu'.*metric keys start with it"),
    ({"name": ""}, "name=''"),
    ({"mask": "attention_mask"}, "mask='attention_mask'.*called with each batch"),
    ({"unit_dims": [1]}, r"unit_dims=\[1\].*maps patterns to dimensions"),
    ({"unit_dims": {"relu": True}}, "unit_dims=.*maps patterns to dimensions"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_senseless_arguments_are_refused(settings, text):
    with pytest.raises(MisconfigurationException, match=text):
        DeadReLUMonitor(**settings)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_at_the_first_batch(argument):
    model, monitor = Net(), DeadReLUMonitor(**{argument: ["encodr.*", "net.1"]})
    with pytest.raises(MisconfigurationException, match=r"encodr\.\*.*matches no activation.*`net\.1`, `net\.3`"):
        fit(model, batches(9), monitor)
    assert len(model.losses) == 1
    assert watchers() == []


def test_patterns_choose_sites_and_keep_names():
    monitor = DeadReLUMonitor(include=["net.3"], **EVERYTHING)
    fit(Net(), batches(4), monitor)
    assert [site.name for site in monitor.report.sites] == ["net.3"]


def masked(returned):
    return lambda batch: returned


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            masked([[True]]),
            r"it returned list, where only a value for each \(batch, time\) tells data. Return booleans",
        ),
        (masked(torch.ones(5)), r"it returned shape \(5,\), where only"),
        (lambda batch: {}["attention_mask"], "KeyError.*attention_mask"),
    ],
    ids=["list", "shape", "raises"],
)
def test_a_mask_that_fails_is_refused_at_the_first_batch_and_later_ends_the_watch_alone(mask, text):
    with pytest.raises(MisconfigurationException, match=rf"`DeadReLUMonitor\(mask=...\)`: .*{text}"):
        fit(Net(), batches(6), DeadReLUMonitor(every_n_steps=1, mask=mask))
    calls = []

    def later(batch):
        calls.append(batch)
        return None if len(calls) < 3 else mask(batch)

    model, monitor = Net(), DeadReLUMonitor(every_n_steps=1, mask=later)
    with pytest.warns(UserWarning, match=f"(?s)the monitor failed and watches no longer.*{text}") as record:
        fit(model, batches(6), monitor)
    assert len([warning for warning in record if "the monitor failed" in str(warning.message)]) == 1
    assert len(model.losses) == 6
    assert monitor.report is None


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.tensor([[0.0, 0.0, -torch.inf]]).expand(5, 3), r"it returned torch.float32 values other than 0 and 1"),
        (torch.full((5, 3), 2), r"it returned torch.int64 values other than 0 and 1"),
        (torch.ones(5, 3, dtype=torch.bool), r"it returned shape \(5, 3\), and no layer's activations .* `mask=None`"),
        (torch.ones(1, 4, dtype=torch.bool), r"it returned shape \(1, 4\), and no layer"),
    ],
    ids=["added to scores", "token types", "of other data", "of features"],
)
def test_a_mask_that_tells_no_data_from_padding_is_refused_at_the_first_batch(mask, text):
    model = Net()
    with pytest.raises(MisconfigurationException, match=rf"`DeadReLUMonitor\(mask=...\)`: {text}"):
        fit(model, batches(6), DeadReLUMonitor(mask=lambda batch: mask))
    assert len(model.losses) <= 1
    assert watchers() == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_zeros_and_ones_are_taken(dtype):
    monitor = DeadReLUMonitor(**EVERYTHING, mask=lambda batch: (torch.arange(5) < 3).to(dtype)[:, None])
    fit(Net(), batches(4), monitor)
    assert [site.samples for site in monitor.report.sites] == [12, 12]
