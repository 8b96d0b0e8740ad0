"""Barriers in loops, counted in assembly written by hand: PTX and AMD's."""

import pytest

from lcdd_kernels.assembly import barriers_in_loops

NESTED = """
.visible .entry kernel(
$L__func_begin0:
\tbar.sync \t0;
$L__BB0_1: // outer
\tld.global.b32 %r1, [%rd1];
$L__BB0_2:                              // inner
\tbar.sync \t0;
\tst.shared.b32 [%r2], %r1;
\tbar.sync \t0, 128;
\t@%p1 bra \t$L__BB0_2;
// %bb.3:
\tbarrier.sync 1;
\t@!%p2 bra \t$L__BB0_1;
\tbar.sync \t0;
\tret;
"""

# A block that was put out of the way jumps back, over a barrier, and is no loop; what follows `ret` is never reached.
OUT_OF_LINE = """
\t@%p1 bra \t$L__BB0_2;
$L__BB0_1:
\tbar.sync \t0;
\tret;
$L__BB0_2:
\tst.global.b32 [%rd1], %r1;
\tbra.uni \t$L__BB0_1;
\tbra.uni \t$L__BB0_1;
"""

# A loop is entered in its middle: the body lies before its header.
ROTATED = """
kernel:                                 ; @kernel
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\ts_barrier
.Ltmp0:
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\ts_cbranch_execz .LBB0_1
; %bb.3:
\ts_cbranch_scc1 .LBB0_5
\ts_barrier
\ts_branch .LBB0_1
.LBB0_5:
\ts_barrier
\ts_endpgm
"""

STRAIGHT = "\tbar.sync \t0;\n\tret;\n"


@pytest.mark.parametrize(("assembly", "count"), [(NESTED, 3), (OUT_OF_LINE, 0), (ROTATED, 2), (STRAIGHT, 0), ("", 0)])
def test_barriers_in_loops(assembly: str, count: int) -> None:
    assert barriers_in_loops(assembly) == count
