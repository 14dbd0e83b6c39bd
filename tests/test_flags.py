"""Every flag of the scripts is seen in its effect; every slip of experiments/slips.py still fits."""

from conftest import ROOT

from experiments import slips


def test_every_slip_can_still_be_made():
    """Each text that experiments/slips.py replaces occurs once."""
    slips.check(ROOT)
