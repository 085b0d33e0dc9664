"""The model of the time on a GPU: what it counts, and that the counts do not grow."""

from __future__ import annotations

import pytest

from gist_kernels.kernels.triton import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("binaries are compiled, not interpreted", allow_module_level=True)

from bench import roofline
from bench.roofline import CARDS, Work

SASS = """
        /*0000*/                   MOV R1, 0x1 ;
                                                   /* 0x0000 */
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/              @!P0 IADD3 R2, R1, 0x1, RZ ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   ATOMG.E.ADD PT, R1, [R2], R3 ;
        /*0050*/               @P0 EXIT ;
        /*0060*/                   STG.E [R2], R1 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP;
"""


def test_counts_loops_as_often_as_they_go_round_and_no_rare_way():
    assert roofline.issued(SASS) == 6
    assert roofline.issued(SASS, 5) == 6 + 4 * 3
    assert roofline.issued(SASS.replace("ATOMG", "LDG")) == 9


def test_counts_loops_within_loops():
    """The first instruction on every way, the second and third ones too, once more around."""
    nested = SASS.replace("@P0 EXIT", "@P0 BRA 0x0").replace("ATOMG", "LDG")
    assert roofline.issued(nested) == 9
    assert roofline.issued(nested, 5) == 9 + 4 * 6
    assert roofline.issued(nested, 5, 7) == 9 + 4 * 3 + (5 * 7 - 1) * 3


def test_tiles_of_attention_go_round_in_both_loops():
    """Twice the tokens: the tiles are four times as many."""
    few, many = (roofline.attention(CARDS["A100"], 1, tokens) for tokens in (160, 320))
    assert many[1].flop == 4 * few[1].flop
    assert 3 < many[1].issues / few[1].issues < 4


def test_the_largest_bound_is_the_time():
    card = CARDS["H100"]
    moved = Work("copy", 1, bytes=card.bytes_per_second)
    assert moved.seconds(card) == 1
    assert moved._replace(flop=3 * card.half_flop_per_second).seconds(card) == 3
    issues = 4 * 132 * 1.83e9 * 2
    assert moved._replace(issues=issues).seconds(card) == pytest.approx(2)


@pytest.mark.parametrize(("name", "most"), [("forward", 1650), ("backward", 2100)])
def test_cycles_of_issue_for_4096_classes(name, most):
    """On sm_90, in bf16: four schedulers issue one instruction a cycle each."""
    work = {w.name.split()[1]: w for w in roofline.loss(CARDS["H100"], 1, 4096)}
    assert work[name].issues / roofline.ISSUES_A_CYCLE <= most
