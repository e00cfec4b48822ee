"""Findings are ranked by how sure they are, and turn into text and plain values."""

import json

from lightning_deadrelu.checkpoint import decode, encode
from lightning_deadrelu.explain.finding import Finding, ranked


def finding(cause, confidence):
    return Finding(cause=cause, where="net.0", measured="seen", confidence=confidence, edit="do(it)", source="arXiv 1")


def test_the_surest_comes_first_and_equally_sure_ones_keep_their_order():
    found = [finding("a", "possible"), finding("b", "certain"), finding("c", "likely"), finding("d", "certain")]
    assert [one.cause for one in ranked(found)] == ["b", "d", "c", "a"]


def test_a_finding_is_plain_values():
    one = finding("a", "likely")
    assert json.loads(json.dumps(one.to_dict())) == one.to_dict()
    assert one.to_dict()["evidence"] == one.evidence == one.measured == "seen"
    assert decode(Finding, encode(one)) == one
