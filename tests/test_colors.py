"""Colors of figures: at most five hues, which people with deuteranopia can tell apart.

Deuteranopia is simulated by the matrix of Machado, Oliveira and Fernandes (2009, severity 1) on
linear RGB; distances are CIEDE2000, of which 1 is about the smallest visible difference.
"""

import colorsys
from itertools import combinations

import numpy as np
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

from tocsr.evaluation.plots import MARK, OURS, PALETTE, PAPER
from tocsr.models.architecture import BLOCK_TYPES

DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
FAR = 10  # CIEDE2000: plainly different colors


def as_deuteranope(rgb):
    "sRGB in [0, 1] as it looks under deuteranopia, in sRGB."
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(DEUTERANOPIA @ linear, 0, 1)
    return np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)


def distance(a, b, view=as_deuteranope):
    "CIEDE2000 of two colors as they look in a view."
    labs = [rgb2lab(view(np.array(to_rgb(c)))) for c in (a, b)]
    return float(deltaE_ciede2000(*labs))


def hues(colors):
    "Those that are neither black, white nor gray."
    return {c for c in colors if colorsys.rgb_to_hls(*to_rgb(c))[2] > 0.1}


def test_the_simulation():
    "White, black and gray stay what they are; green on red vanishes, blue on orange does not."
    for gray in ("#000000", "#767676", "#ffffff"):
        assert distance(gray, gray) == 0
        assert np.allclose(as_deuteranope(np.array(to_rgb(gray))), to_rgb(gray), atol=1e-3)
    matplotlibs = ("#2ca02c", "#d62728")
    assert distance(*matplotlibs) < 0.4 * distance(*matplotlibs, view=lambda rgb: rgb)
    assert distance("#0000ff", "#ff8000") > 50


def test_figures_have_at_most_five_hues():
    colors = {*PALETTE, OURS, PAPER, MARK}
    assert len(hues(colors)) <= 5 and not hues([PAPER])
    assert {t.color for t in BLOCK_TYPES.values()} <= colors


def test_deuteranopes_tell_all_colors_apart():
    near = {
        (a, b): round(distance(a, b), 1)
        for a, b in combinations({*PALETTE, OURS, PAPER, MARK}, 2)
        if distance(a, b) < FAR
    }
    assert not near
