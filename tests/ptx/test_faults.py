"""What the PTX interpreter finds in a program besides its results, on pieces of PTX."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import FaultError
from snippets import run


def words(count: int = 32) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


def fails(message: str, body: str, **options) -> None:
    with pytest.raises(FaultError, match=message):
        run(body, **options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%at_a+4];", "outside: 4 bytes from 128 of a, which has 128"),
        ("ld.global.b32 %r1, [%at_a+-4];", "outside: 4 bytes from -4 of a"),
        ("ld.global.v2.b32 {%r1, %r2}, [%a+124];", "misaligned access of 8 bytes to a"),
        ("st.global.v4.b32 [%out+120], {%r1, %r1, %r1, %r1};", "misaligned access of 16 bytes"),
        ("add.u64 %rd1, %a, 2; ld.global.b32 %r1, [%rd1];", "misaligned access of 4 bytes to a"),
        ("mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];", "outside: no tensor"),
        ("ld.shared.b32 %r1, [%near+1024];", "outside: 4 bytes from 1024 of shared memory"),
        ("st.global.b32 [%at_a], %lane;", "input: a is written to"),
        ("atom.global.gpu.relaxed.add.u32 %r1, [%a], 1;", "input: a is written to"),
        ("st.global.b32 [%out], %lane;", "race: threads store different values to one place"),
    ],
)
def test_an_access_that_no_program_may_make(body, message):
    fails(message, body, a=words(), out=words())


def test_a_fault_names_the_kernel_the_program_and_the_line():
    with pytest.raises(
        FaultError, match=r"kernel, program 0, ld.global.b32 %r1, \[%at_a\+4\] \(line"
    ):
        run("ld.global.b32 %r1, [%at_a+4];", a=words(), out=words())


def test_between_the_rows_of_a_tensor_is_outside():
    wide = np.zeros((4, 16), np.uint32)
    body = "setp.lt.s32 %p1, %lane, {}; @%p1 ld.global.b32 %r1, [%at_a];"
    run(body.format(8), a=wide[:, :8])
    fails("outside: byte 32 lies between the rows of a", body.format(9), a=wide[:, :8])
    run("setp.eq.s32 %p1, %lane, 16; @%p1 ld.global.b32 %r1, [%at_a];", a=wide[:, :8])
    fails("outside", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a];", a=wide[:, :2])
    run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a];", a=wide[:, :4])


def test_a_thread_whose_predicate_is_false_accesses_nothing():
    run("setp.lt.s32 %p1, %lane, 31; @%p1 ld.global.b32 %r1, [%at_a+4];", a=words())


def test_reads_of_what_nobody_wrote():
    fails("unwritten: byte 0 of out", "ld.global.b32 %r1, [%at_out];", out=words(),
          undefined=("out",))  # fmt: skip
    run("st.global.b32 [%at_out], %lane; ld.global.b32 %r1, [%at_out];", out=words(),
        undefined=("out",))  # fmt: skip
    fails("unwritten: byte 0 of shared memory", "ld.shared.b32 %r1, [%near];", out=words())
    # One of the bytes is enough.
    body = "st.shared.b8 [%near], %h1; ld.shared.b32 %r1, [%near];"
    fails("unwritten", body, out=words())


STORE, LOAD = "st.shared.b32 [%near], %lane;", "ld.shared.b32 %r1, [%near];"
# The element of the other of two warps.
OTHER = "xor.b32 %r2, %near, 128;"
STORE_OTHER, LOAD_OTHER = "st.shared.b32 [%r2], %lane;", "ld.shared.b32 %r1, [%r2];"
BARRIER = "bar.sync 0;"


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("first", "then"), [(STORE, LOAD_OTHER), (LOAD, STORE_OTHER), (STORE, STORE_OTHER)]
)
def test_two_warps_that_share_a_place_need_a_barrier(first, then, seed):
    start = OTHER + STORE + BARRIER
    run(start + first + BARRIER + then, threads=64, out=words(64), seed=seed)
    run(start + first + "bar.warp.sync -1;" + LOAD, threads=64, out=words(64), seed=seed)
    # Interleaved, a warp may find the other's place before it is written anew.
    fails("race", start + first + then, threads=64, out=words(64), seed=seed)


def test_a_barrier_orders_what_came_before_it_only():
    body = OTHER + STORE + BARRIER + LOAD_OTHER + STORE
    fails("race: shared memory, about byte 0, is written, and was read", body, threads=64,
          out=words(64))  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_barrier_that_the_source_does_not_have_orders_shared_memory_only(seed):
    """Triton put it there, and need not in its next version."""
    of_tensor = "st.global.b32 [%at_out], %lane; {} xor.b32 %r2, %near, 128; cvt.u64.u32 %rd1, %r2;"
    of_tensor += "add.u64 %rd1, %rd1, %out; ld.global.b32 %r1, [%rd1];"
    asked, own = ".loc 1 7 0\n" + BARRIER, ".loc 1 8 0\n" + BARRIER
    options = {"threads": 64, "seed": seed, "barriers": {"?:7"}}
    run(OTHER + STORE + own + LOAD_OTHER, **options, out=words(64))
    run(of_tensor.format(asked), **options, out=words(64))
    fails("race: byte .* of out is read", of_tensor.format(own), **options, out=words(64))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_programs_are_in_no_order(seed):
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;
        @%p1 st.global.b32 [%at_out], %near; @!%p1 ld.global.b32 %r2, [%at_out];"""
    fails("race", body, programs=2, out=words(), seed=seed)


def test_tensors_that_share_memory_race_under_two_names():
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;
        @%p1 ld.global.b32 %r2, [%at_a]; @!%p1 st.global.b32 [%at_out], %near;"""
    memory = words(64)
    run(body, programs=2, a=memory[:32], out=memory[32:])
    fails("race: out, about byte 0, is written, and was read by program 0", body, programs=2,
          a=memory[:32], out=memory[:32])  # fmt: skip


# Each program writes one element; the last one to arrive adds them all up.
LAST_ARRIVER = """
    mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd1, %r1, 4; add.u64 %rd1, %rd1, %sums;
    setp.eq.s32 %p1, %lane, 33; @%p1 st.global.b32 [%rd1], %r1;
    {barrier}
    setp.eq.s32 %p2, %lane, 0; mov.b32 %r2, 0;
    @%p2 atom.global.{scope}.{order}.add.u32 %r2, [%counter], 1;
    @%p2 st.shared.b32 [%near], %r2; bar.sync 0; ld.shared.b32 %r2, [0]; bar.sync 0;
    setp.eq.u32 %p3, %r2, 3; @!%p3 bra END;
    mov.b32 %r3, 0; mov.b32 %r4, 0;
    mov.b64 %rd2, %sums;
    AGAIN: ld.global.b32 %r5, [%rd2]; add.u32 %r3, %r3, %r5; add.u64 %rd2, %rd2, 4;
    add.u32 %r4, %r4, 1; setp.lt.u32 %p4, %r4, 4; @%p4 bra AGAIN;
    st.global.b32 [%out], %r3;
    END:
"""


def last_arriver(order: str, scope: str, barrier: str, seed: int | None) -> int:
    out = np.zeros(1, np.uint32)
    body = LAST_ARRIVER.format(order=order, scope=scope, barrier=barrier)
    run(body, threads=64, programs=4, seed=seed, out=out, sums=words(4),
        counter=np.zeros(1, np.uint32), written=("out", "sums", "counter"),
        undefined=("sums",))  # fmt: skip
    return int(out[0])


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("order", "scope", "barrier", "ordered"),
    [
        ("acq_rel", "gpu", BARRIER, True),
        ("acq_rel", "sys", BARRIER, True),
        ("acq_rel", "cta", BARRIER, False),
        ("relaxed", "gpu", BARRIER, False),
        ("release", "gpu", BARRIER, False),
        ("acquire", "gpu", BARRIER, False),
        ("acq_rel", "gpu", "", False),  # the atomic releases what its own warp wrote
    ],
)
def test_an_atomic_orders_programs_by_its_semantics_and_its_scope(
    order, scope, barrier, ordered, seed
):
    if ordered:
        assert last_arriver(order, scope, barrier, seed) == 0 + 1 + 2 + 3
    else:
        with pytest.raises(FaultError, match="race: byte .* of sums is read, and was written by"):
            last_arriver(order, scope, barrier, seed)


def test_an_atomic_races_with_a_plain_write():
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %lane, 0;
        @!%p2 bra END; @%p1 st.global.b32 [%out], 7;
        @!%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%out], 1; END:"""
    fails("race", body, programs=2, out=words())
    run(body.replace("st.global.b32 [%out], 7", "red.global.gpu.relaxed.add.u32 [%out], 7"),
        programs=2, out=words())  # fmt: skip


COPY = "cp.async.ca.shared.global [%near], [%at_a], 4{}; cp.async.commit_group;"
WAIT = "cp.async.wait_group {};"


def test_a_copy_has_landed_when_it_was_waited_for():
    store = "ld.shared.b32 %r1, [%near]; st.global.b32 [%at_out], %r1;"
    out = words() * 0
    run(COPY.format("") + WAIT.format(0) + store, a=words(), out=out)
    assert (out == words()).all()
    fails("unwritten: byte 0 of shared memory", COPY.format("") + store, a=words(), out=out)
    fails("unwritten", COPY.format("") + WAIT.format(1) + store, a=words(), out=out)
    run(COPY.format("") + "cp.async.commit_group;" + WAIT.format(1) + store, a=words(), out=out)
    # Of 0 bytes, zeros are copied, and nothing is read.
    run(COPY.format(", 0") + WAIT.format(0) + store, a=words(1), out=out)
    assert (out == 0).all()


def test_a_copy_needs_a_barrier_before_and_after_like_a_store():
    other = OTHER + "ld.shared.b32 %r1, [%r2];"
    copy = COPY.format("") + WAIT.format(0)
    run(copy + BARRIER + other, threads=64, a=words(64))
    fails("race|unwritten", copy + other, threads=64, a=words(64))
    start = STORE + BARRIER + other
    run(start + BARRIER + copy, threads=64, a=words(64))
    fails("race: shared memory", start + copy, threads=64, a=words(64))


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.s32 %p1, %lane, 32; @%p1 bra END; bar.sync 0; END:",
        "setp.lt.s32 %p1, %lane, 32; @%p1 bra B; bar.sync 0; bra END; B: bar.sync 0; END:",
        "setp.lt.s32 %p1, %lane, 9; @%p1 bra END; shfl.sync.idx.b32 %r1, %lane, 0, 31, -1; END:",
    ],
)
def test_threads_that_wait_for_others_in_vain(body):
    fails("hang", body, threads=64, out=words())


def test_the_order_of_programs_is_drawn_from_the_seed():
    """Each program takes a ticket."""
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd1, %r1, 4; add.u64 %rd1, %rd1, %out;
        setp.eq.s32 %p1, %lane, 0; @!%p1 bra END;
        atom.global.gpu.relaxed.add.u32 %r2, [%counter], 1; st.global.b32 [%rd1], %r2; END:"""

    def tickets(seed: int | None) -> list[int]:
        out = np.zeros(12, np.uint32)
        run(body, programs=12, out=out, counter=words(1), written=("out", "counter"), seed=seed)
        assert sorted(out) == list(range(12))
        return out.tolist()

    assert tickets(None) == list(range(12))
    assert tickets(1) == tickets(1)
    assert len({tuple(tickets(seed)) for seed in range(5)}) == 5
