"The grammar of architectures, and a new block type added in one place."

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tocsr.core.config import UNetConfig
from tocsr.core.store import TrainOptions
from tocsr.evaluation.drawings import draw_architecture, draw_architectures, draw_library
from tocsr.models.architecture import (
    BLOCK_TYPES,
    PAPER_ARCHITECTURE,
    REMOVED,
    Architecture,
    BlockType,
    StageError,
    StageShape,
    StageSpec,
    design_fits,
    register_block_type,
)
from tocsr.models.complexity import count_macs, count_params, macs_by_kind, unet_inputs
from tocsr.models.diffusion import nano_unet, null_context
from tocsr.models.staged_unet import (
    StagedUNet,
    load_staged_unet,
    save_staged_unet,
    split_into_stages,
)
from tocsr.models.surrogates import assemble, build_library
from tocsr.stages.feature_distillation import distill_surrogates

SD15 = "[RARA-RARA-RARA-RR]-[RAR]-[RRR-RARARA-RARARA-RARARA]"


def test_designs_read_back():
    for name in ("R", "RAA", "RR/2", "R^", "RSRS/2^", "RAAR"):
        assert StageSpec.parse(name).name == name
    assert StageSpec("RAAR").blocks == ("RAA", "R")
    assert StageSpec.parse("RSRS/2^") == StageSpec("RSRS", 2, True)


@pytest.mark.parametrize("bad", ["", "AR", "R//2", "r", "R/0", "RX"])
def test_bad_designs_are_refused(bad):
    with pytest.raises(StageError):
        StageSpec.parse(bad)


def test_architectures_read_back():
    paper = Architecture.parse(PAPER_ARCHITECTURE)
    assert paper.options == ("R", "R", "R", "none", "none", "none", "R", "RA", "RAA")
    assert str(paper) == PAPER_ARCHITECTURE
    sd15 = Architecture.parse(SD15)
    assert str(sd15) == SD15 and sd15.by_stage["D4"] == "RRR"
    assert str(sd15.swap(D4=REMOVED, E1="R/2")) == "[R/2-RARA-RARA-RR]-[RAR]-[RARARA-RARARA-RARARA]"
    assert Architecture.parse("[R-R]-[R-R]", levels=3).levels == 3


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "R-R",
        "R-R-R",
        "[R-R-R]",
        "[R-R-R][R-R-R]",
        "[R-R-R]-[R-R]",
        "[R-R-X]-[R-R-R]",
        "[R-R-R]-[R-R]-[R-R-R]",
    ],
)
def test_bad_architectures_are_refused(bad):
    with pytest.raises(StageError):
        Architecture.parse(bad)


def test_only_the_deepest_stages_can_be_removed():
    paper = Architecture.parse(PAPER_ARCHITECTURE)
    with pytest.raises(StageError, match="E1 cannot be removed"):
        paper.swap(E1=REMOVED)
    with pytest.raises(StageError, match="no stage"):
        paper.swap(E9="R")


def test_designs_larger_than_the_teacher_do_not_fit():
    e1 = StageShape("E1", 1, "RARA", 32, 32)
    fits = {
        d: design_fits(StageSpec.parse(d), e1)
        for d in ("RA", "RSRS/2", "RR", "RRR", "RAAA", "RASA", "R^")
    }
    assert fits == {
        "RA": True,
        "RSRS/2": True,
        "RR": True,
        "RRR": False,
        "RAAA": False,
        "RASA": False,
        "R^": False,
    }


class DepthwiseConvolution(nn.Module):
    "x + depthwise convolution, called as diffusers calls a transformer block."

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x, encoder_hidden_states=None, return_dict=True):
        return (x + self.conv(x),)


@contextmanager
def depthwise_letter():
    "The letter W, for the time of a test."

    @register_block_type
    class DepthwiseBlockType(BlockType):
        letter = "W"
        title = "depthwise convolution"
        color = "#123456"

        @staticmethod
        def build(source):
            return DepthwiseConvolution(source.channels_out)

    try:
        yield DepthwiseBlockType
    finally:
        del BLOCK_TYPES["W"]


def test_a_new_letter_is_one_place(tmp_path):
    torch.manual_seed(0)
    unet = nano_unet(UNetConfig(), 16).eval().requires_grad_(False)
    teacher = split_into_stages(unet)
    with pytest.raises(StageError, match="RW"):
        StageSpec("RW")
    with depthwise_letter() as letter:
        text = "[R-RW-R]-[R-RWA-RW/2]"
        assert str(Architecture.parse(text)) == text
        designs = {n: (o,) for n, o in Architecture.parse(text).by_stage.items() if o != REMOVED}
        library = build_library(teacher, designs, context=null_context(unet, 1))
        assert isinstance(
            library.surrogates["E2"]["RW"].blocks[0].attentions[0], DepthwiseConvolution
        )

        def batch(step):
            return torch.randn(2, 16, 8, 8), torch.tensor([5, 900]), null_context(unet, 2)

        weight = library.surrogates["E2"]["RW"].blocks[0].attentions[0].conv.weight
        before = weight.clone()
        losses = distill_surrogates(
            teacher, library, batch, steps=1, lr=1e-3, options=TrainOptions(tmp_path / "scratch")
        )
        assert losses.shape == (1, 6) and not torch.equal(weight, before)

        net = assemble(teacher, library, text).eval()
        inputs = unet_inputs(net, side=16, tokens=1)
        assert sum(macs_by_kind(net, *inputs).values()) == count_macs(net, *inputs)
        z = torch.randn(1, 16, 16, 16)
        again = load_staged_unet(save_staged_unet(tmp_path / "net", net))
        with torch.no_grad():
            assert torch.equal(
                again(z, 3, null_context(unet, 1)).sample, net(z, 3, null_context(unet, 1)).sample
            )
        assert count_params(StagedUNet.from_config(net.config)) == count_params(net)

        fig = draw_architecture(Architecture.parse(text).by_stage)
        drawn = {t.get_text() for t in fig.axes[0].texts} | {
            t.get_text() for t in fig.legends[0].get_texts()
        }
        assert {"W", letter.title} <= drawn
    with pytest.raises(StageError):
        StageSpec("RW")


def test_a_letter_cannot_be_taken_twice():
    class Other(BlockType):
        letter = "R"
        title = "another"
        color = "#000000"

    class Lower(Other):
        letter = "r"

    with pytest.raises(StageError, match="is taken by"):
        register_block_type(Other)
    with pytest.raises(StageError, match="one capital letter"):
        register_block_type(Lower)
    assert BLOCK_TYPES["R"].title == "residual block"


def test_drawings_show_every_block():
    rows = [
        dict(stage=s, design=d, params=p)
        for s, d, p in [
            ("E1", "RARA", 92_000),
            ("E1", "RS/2", 20_000),
            ("Mid", "RAR", 1_240_000),
            ("Mid", "R", 430_000),
            ("D1", "RARARA", 200_000),
            ("D1", "R", 30_000),
            ("D1", "RAA", 90_000),
        ]
    ]
    fig = draw_library(rows, removable=("Mid",))
    assert [a.get_title() for a in fig.axes] == ["E1", "Mid", "D1"]
    assert {"1.24 M", "430 k"} <= {t.get_text() for t in fig.axes[1].texts}
    assert len(fig.axes[2].patches) == 10
    entries = [t.get_text() for t in fig.legends[0].get_texts()]
    assert entries == [
        *(t.title for t in BLOCK_TYPES.values()),
        "low box: reduced width",
        "removed",
    ]
    sizes = [t.get_text() for t in fig.axes[2].texts if t.get_text().endswith(" k")]
    assert sizes == ["200 k", "90 k", "30 k"]  # the teacher, then surrogates from large to small
    assert {"teacher", "surrogates"} <= {t.get_text() for t in fig.axes[0].texts}

    found = Architecture.parse(PAPER_ARCHITECTURE).by_stage
    ax = draw_architecture(found, {n: 100_000 for n in found}, "title").axes[0]
    assert len(ax.patches) == 9 and len(ax.lines) == 3
    assert sum("100 k" in t.get_text() for t in ax.texts) == 6
    assert (
        sum(getattr(t, "arrow_patch", None) is not None for t in ax.texts) == 3
    )  # three levels left, three skips

    other = Architecture.parse("[R-R-R]-[R-R-RA]").by_stage
    fig = draw_architectures({"the paper's": found, "other": other})
    assert [a.get_title() for a in fig.axes] == ["the paper's", "other"]
    assert [len(a.patches) for a in fig.axes] == [9 + 2, 7 + 2]  # D2 and D1 differ and have frames
    entries = [t.get_text() for t in fig.legends[0].get_texts()]
    assert entries[-2:] == ["removed", "differs"]
