"Start-up times as ratios to their lower bounds, so that the machine's speed and load cancel."

import pytest
from bench_tool import STARTUPS, measure


@pytest.mark.parametrize("name, limit", [("help", 15), ("pipeline", 2), ("upscale", 4)])
def test_start_up_adds_little_to_what_must_be_loaded(name, limit):
    assert measure(STARTUPS[name])["cpu_ratio"] < limit
