"""The PTX interpreter's instructions, by the rules of the PTX manual."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import UnsupportedError, parse
from snippets import each_thread, run

INF, NAN = math.inf, math.nan
SMALLEST = 2.0**-149  # a subnormal number of float32
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.1415927, 1e-30, 1e30, 2.0**-126, SMALLEST, INF, -INF, NAN], np.float32
)
A, B = (each.ravel() for each in np.meshgrid(FLOATS, FLOATS))
INTEGERS = np.array([0, 1, -1, 7, -7, 13, 2**31 - 1, -(2**31)], np.int32)
M, N = (each.ravel() for each in np.meshgrid(INTEGERS, INTEGERS))


def floats(body: str, **inputs) -> np.ndarray:
    return each_thread(body, **inputs).view(np.float32)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.f32", np.add),
        ("sub.rn.f32", np.subtract),
        ("mul.f32", np.multiply),
        ("div.full.f32", np.divide),
        ("div.rn.f32", np.divide),
    ],
)
@np.errstate(all="ignore")
def test_float32(opcode, function):
    np.testing.assert_array_equal(
        floats(f"{opcode} %r0, %r1, %r2;", a=A, b=B), function(A, B, dtype=np.float32)
    )


@pytest.mark.parametrize("opcode", ["add.ftz.f32", "mul.ftz.f32", "sub.ftz.f32"])
def test_ftz_flushes_operands_and_results_to_zeros_of_their_sign(opcode):
    subnormal = np.array([SMALLEST, -SMALLEST], np.float32)
    one = np.array([1.0, 1.0], np.float32)
    kept = floats(f"{opcode.replace('.ftz', '')} %r0, %r1, %r2;", a=subnormal, b=one)
    found = floats(f"{opcode} %r0, %r1, %r2;", a=subnormal, b=one)
    if opcode.startswith("mul"):
        assert (kept == subnormal).all()
        assert (found == 0).all()
        assert np.signbit(found).tolist() == [False, True]
        halves = np.full(2, 0.5, np.float32)
        result = floats("mul.ftz.f32 %r0, %r1, %r2;", a=np.full(2, 2.0**-126, np.float32), b=halves)
        assert (result == 0).all()
    else:
        assert (abs(found) == 1).all()


def test_fma_rounds_once():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 4096)).astype(np.float32)
    # c cancels most of the product, or is far smaller or larger than it.
    scale = np.float32(2.0) ** generator.integers(-40, 40, 4096).astype(np.float32)
    c = np.where(np.arange(4096) % 2, -a * b, scale * b).astype(np.float32)
    found = floats("fma.rn.f32 %r0, %r1, %r2, %r3;", a=a, b=b, c=c)
    for x, y, z, value in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(value)) - exact)
        for other in (np.nextafter(value, np.float32(INF)), np.nextafter(value, np.float32(-INF))):
            assert error <= abs(Fraction(float(other)) - exact)
    twice = a * b + c  # the product is rounded as well
    assert (found != twice).any()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_products_of_halves_are_rounded_once(kind, dtype):
    a, b = torch.randn(2, 4096, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    a[0, 0], b[0, 0], b[1, 1] = -0.0, 1.0, torch.inf
    exact = a.double() * b.double()
    packed = {"a": a.view(torch.int32).numpy().ravel(), "b": b.view(torch.int32).numpy().ravel()}
    for body in (f"mul.{kind}x2 %r0, %r1, %r2;", f"fma.rn.{kind}x2 %r0, %r1, %r2, 0x80008000;"):
        found = torch.from_numpy(each_thread(body, **packed).view(np.int32)).view(dtype)
        torch.testing.assert_close(found.view(-1, 2), exact.to(dtype), rtol=0, atol=0)
        assert (found.signbit() == exact.flatten().signbit()).all()
    with pytest.raises(UnsupportedError):
        each_thread(f"add.{kind}x2 %r0, %r1, %r2;", **packed)


@pytest.mark.parametrize(("opcode", "pick"), [("min.f32", min), ("max.f32", max)])
def test_min_and_max_drop_a_nan_and_order_zeros(opcode, pick):
    found = floats(f"{opcode} %r0, %r1, %r2;", a=A, b=B)
    for a, b, value in zip(A.tolist(), B.tolist(), found.tolist(), strict=True):
        numbers = [each for each in (a, b) if not math.isnan(each)]
        if not numbers:
            assert math.isnan(value)
            continue
        best = pick(numbers, key=lambda each: (each, math.copysign(1, each)))
        assert (value, math.copysign(1, value)) == (best, math.copysign(1, best))


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_with_a_nan_are_false_or_if_unordered_true(compare):
    body = "setp.{}.f32 %p0, %r1, %r2; selp.b32 %r0, 1, 0, %p0;"
    ordered = each_thread(body.format(compare), a=A, b=B)
    unordered = each_thread(body.format(compare + "u"), a=A, b=B)
    nan = np.isnan(A) | np.isnan(B)
    expected = getattr(torch, compare)(torch.tensor(A), torch.tensor(B)).numpy()
    assert (ordered == (expected & ~nan)).all()
    assert (unordered == (expected | nan)).all()
    assert (each_thread(body.format("nan"), a=A, b=B) == nan).all()
    assert (each_thread(body.format("num"), a=A, b=B) == ~nan).all()


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("rcp.approx.f32", np.reciprocal),
        ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx.f32", np.tanh),
    ],
)
@np.errstate(all="ignore")
def test_approximations_are_exact_here(opcode, function):
    x = np.concatenate((FLOATS, np.linspace(-9, 9, 1000, dtype=np.float32)))
    expected = function(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(floats(f"{opcode} %r0, %r1;", a=x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_to_nearest_even(dtype):
    """All numbers between two halves, ties among them, and what overflows."""
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    bits = 8 if dtype is torch.bfloat16 else 11
    ties = 1 + np.arange(64) * 2.0 ** -(bits + 1)
    x = np.concatenate((FLOATS, ties, -ties, [65504, 65519.9, 65520, 3.4e38], 1e-6 * ties))
    x = x.astype(np.float32)
    expected = torch.tensor(x).to(dtype)
    body = f"cvt.rn.{kind}.f32 %h1, %r1; mov.b32 %r0, {{%h1, %h1}};"
    found = each_thread(body, a=x)
    both = each_thread(f"cvt.rn.{kind}x2.f32 %r0, %r1, %r2;", a=x, b=np.float32([1.0]))
    back = floats(f"cvt.rn.{kind}.f32 %h1, %r1; cvt.f32.{kind} %r0, %h1;", a=x)
    number = ~np.isnan(x)
    wanted = expected.view(torch.int16).numpy().view(np.uint16)
    one = torch.ones((), dtype=dtype).view(torch.int16).item()
    assert (found[number] == wanted[number] * np.uint32(65537)).all()
    assert (both[number] >> 16 == wanted[number]).all()
    assert (both & 0xFFFF == one).all()
    np.testing.assert_array_equal(back, expected.float().numpy())
    assert (found[~number] == 0x7FFF7FFF).all()


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: (a * b) >> 32),
        ("mul.hi.u32", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("min.s32", min),
        ("max.u32", lambda a, b: max(a % 2**32, b % 2**32)),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
        ("div.s32", lambda a, b: int(math.copysign(1, a * b)) * (abs(a) // abs(b)) if b else -1),
        ("rem.s32", lambda a, b: int(math.fmod(a, b)) if b else None),
        ("div.u32", lambda a, b: (a % 2**32) // (b % 2**32) if b else -1),
        ("shl.b32", lambda a, b: a << b % 2**32 if b % 2**32 < 32 else 0),
        ("shr.u32", lambda a, b: (a % 2**32) >> min(b % 2**32, 32)),
        ("shr.s32", lambda a, b: a >> min(b % 2**32, 31)),
    ],
)
def test_integers_wrap_divide_towards_zero_and_shift_out(opcode, function):
    found = each_thread(f"{opcode} %r0, %r1, %r2;", a=M, b=N)
    for a, b, value in zip(M.tolist(), N.tolist(), found.tolist(), strict=True):
        expected = function(a, b)
        assert expected is None or value == expected % 2**32, (a, b)


def test_wide_products_and_parts_of_registers():
    body = (
        "mul.wide.{0}32 %rd1, %r1, %r2; mad.wide.{0}32 %rd1, %r1, %r2, %rd1;"
        "mov.b64 {{%r3, %r4}}, %rd1; mov.b32 %r0, %r{1};"
    )
    for letter, of in (("s", lambda x: x), ("u", lambda x: x % 2**32)):
        low, high = (each_thread(body.format(letter, i), a=M, b=N) for i in (3, 4))
        for a, b, x, y in zip(M.tolist(), N.tolist(), low.tolist(), high.tolist(), strict=True):
            assert x + (y << 32) == 2 * of(a) * of(b) % 2**64
    swapped = each_thread("mov.b32 {%h1, %h2}, %r1; mov.b32 %r0, {%h2, %h1};", a=M)
    assert swapped.tolist() == [(i % 2**32 << 16 | i % 2**32 >> 16) % 2**32 for i in M.tolist()]


def test_bytes_and_bits():
    word = np.array([0x83C2A190], np.uint32)
    other = np.array([0x11223344], np.uint32)
    # Bytes 0 to 3 are of a, 4 to 7 of b; 8 and above repeat the sign.
    assert each_thread("prmt.b32 %r0, %r1, %r2, 0x7410;", a=word, b=other).tolist() == [0x1144A190]
    assert each_thread("prmt.b32 %r0, %r1, %r2, 0xb8c3;", a=word, b=other).tolist() == [0xFFFF0083]
    for start, count in ((0, 8), (4, 12), (24, 8), (28, 8), (31, 1), (3, 0), (0, 32)):
        field = 0x83C2A190 >> start & (1 << count) - 1
        body = f"bfe.u32 %r0, %r1, {start}, {count};"
        assert each_thread(body, a=word).tolist() == [field]
        top = min(start + count - 1, 31)
        sign = 0x83C2A190 >> top & 1 if count else 0
        used = max(0, top - start + 1)
        signed = (field & (1 << used) - 1) - (sign << used if count else 0)
        body = f"bfe.s32 %r0, %r1, {start}, {count};"
        assert each_thread(body, a=word).tolist() == [signed % 2**32]


def test_conversions():
    x = np.array([2.5, -2.5, 0.5, 1e10, -1e10, NAN], np.float32)
    for way, expected in (
        ("rzi", [2, -2, 0, 2**31 - 1, -(2**31), 0]),
        ("rni", [2, -2, 0, 2**31 - 1, -(2**31), 0]),
        ("rmi", [2, -3, 0, 2**31 - 1, -(2**31), 0]),
        ("rpi", [3, -2, 1, 2**31 - 1, -(2**31), 0]),
    ):
        found = each_thread(f"cvt.{way}.s32.f32 %r0, %r1;", a=x)
        assert found.view(np.int32).tolist() == expected
    found = each_thread("cvt.rzi.u32.f32 %r0, %r1;", a=x).tolist()
    assert found == [2, 0, 0, 2**32 - 1, 0, 0]
    numbers = floats("cvt.rn.f32.s32 %r0, %r1;", a=M)
    np.testing.assert_array_equal(numbers, M.astype(np.float32))
    third = np.float64([1 / 3]).view(np.uint64).item()
    body = f"mov.b64 %rd1, {third}; cvt.rn.f32.f64 %r0, %rd1;"
    assert floats(body, a=M)[0] == np.float32(1 / 3)
    # A narrow type is the register's low bits; its sign fills what is above.
    assert (each_thread("cvt.s32.s16 %r0, %r1;", a=M).view(np.int32) == M.astype(np.int16)).all()
    assert (each_thread("cvt.u32.u8 %r0, %r1;", a=M) == M.astype(np.uint8)).all()
    assert each_thread(
        "cvt.s64.s32 %rd1, %r1; shr.u64 %rd1, %rd1, 32; cvt.u32.u64 %r0, %rd1;", a=M
    ).tolist() == [0xFFFFFFFF if i < 0 else 0 for i in M.tolist()]


def test_a_predicate_masks_an_instruction():
    body = (
        "mov.b32 %r0, 9; setp.lt.s32 %p1, %lane, 20; setp.ge.and.s32 %p2, %lane, 10, %p1;"
        "@%p2 mov.b32 %r0, 1; @!%p1 mov.b32 %r0, 2;"
    )
    found = each_thread(body, a=np.zeros(32, np.uint32))
    assert found.tolist() == 10 * [9] + 10 * [1] + 12 * [2]


def test_threads_part_at_a_branch_and_meet_again():
    """The way that a shuffle needs, whichever of them stands first in the text."""
    body = (
        "setp.lt.s32 %p1, %lane, 7; @%p1 bra AWAY;"
        "mov.b32 %r1, 100;"
        "BACK: shfl.sync.bfly.b32 %r0, %r1, 31, 31, -1; bra END;"
        "AWAY: mov.b32 %r1, %lane; bra BACK;"
        "END:"
    )
    found = each_thread(body, a=np.zeros(32, np.uint32))
    assert found.tolist() == 25 * [100] + [6, 5, 4, 3, 2, 1, 0]


def test_a_loop_ends_for_each_thread_by_itself():
    body = (
        "mov.b32 %r0, 0; mov.b32 %r2, 0;"
        "AGAIN: add.s32 %r0, %r0, %r1; add.s32 %r2, %r2, 1;"
        "setp.le.s32 %p1, %r2, %lane; @%p1 bra AGAIN;"
    )
    found = each_thread(body, a=np.full(64, 3, np.uint32))
    assert found.tolist() == [3 * (i + 1) for i in range(64)]


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ("bfly.b32 %r0, %r1, 5, 31", lambda i: i ^ 5),
        ("idx.b32 %r0, %r1, 3, 31", lambda i: 3),
        ("down.b32 %r0, %r1, 4, 31", lambda i: i + 4 if i + 4 < 32 else i),
        ("up.b32 %r0, %r1, 4, 0", lambda i: i - 4 if i >= 4 else i),
        # Segments of 8 lanes: 0b11000 in bits 8 to 12.
        ("down.b32 %r0, %r1, 4, 0x181f", lambda i: i + 4 if i % 8 < 4 else i),
        ("idx.b32 %r0, %r1, 2, 0x181f", lambda i: i // 8 * 8 + 2),
    ],
)
def test_shuffles(arguments, source):
    values = np.arange(64, dtype=np.uint32) * 3
    found = each_thread(f"shfl.sync.{arguments}, -1;", a=values)
    lanes = [i // 32 * 32 + source(i % 32) for i in range(64)]
    assert found.tolist() == [3 * lane for lane in lanes]


def test_redux():
    values = np.random.default_rng(0).integers(0, 2**31, 64).astype(np.uint32)
    for name, function in (("add", np.add), ("max", np.maximum), ("min", np.minimum)):
        found = each_thread(f"redux.sync.{name}.u32 %r0, %r1, -1;", a=values)
        each = function.reduce(values.reshape(2, 32), axis=1, dtype=np.uint32)
        assert found.tolist() == np.repeat(each, 32).tolist()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_matrices_reach_the_tensor_cores_and_come_back(kind):
    """A (16, K) by (K, 8) product whose operands ldmatrix loads from shared memory."""
    depth = 8 if kind == "tf32" else 16
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    left = torch.randint(-8, 8, (16, depth)).to(dtype)
    right = torch.randint(-8, 8, (depth, 8)).to(dtype)
    shape = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    # Rows of 16 bytes: of a in quarters (top left, bottom left, top right, bottom right), then
    # of b's columns.
    columns = depth // 2
    quarters = [left[r : r + 8, c : c + columns] for c in (0, columns) for r in (0, 8)]
    a = torch.stack(quarters).contiguous().view(torch.int32).numpy().view(np.uint32).ravel()
    halves = [right.t()[:, c : c + columns] for c in (0, columns)]
    b = torch.stack(halves).contiguous().view(torch.int32).numpy().view(np.uint32).ravel()
    shared = np.concatenate((a, b))
    out = np.zeros((16, 8), np.float32)
    copies = "".join(
        f"ld.global.b32 %r1, [%at_given+{128 * i}]; st.shared.b32 [%near+{128 * i}], %r1;"
        for i in range(len(shared) // 32)
    )
    body = f"""{copies} bar.sync 0;
        shl.b32 %r2, %lane, 4;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
        and.b32 %r2, %r2, 0xff;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r7, %r8}}, [%r2+{4 * len(a)}];
        mov.b32 %r9, 0f3f800000;
        {shape} {{%r10, %r11, %r12, %r13}}, {{%r3, %r4, %r5, %r6}}, {{%r7, %r8}},
            {{%r9, %r9, %r9, %r9}};
        shl.b32 %r14, %lane, 3;
        cvt.u64.u32 %rd1, %r14;
        add.u64 %rd1, %rd1, %out;
        st.global.v2.b32 [%rd1], {{%r10, %r11}};
        st.global.v2.b32 [%rd1+256], {{%r12, %r13}};"""
    run(body, given=shared, out=out)
    expected = left.double() @ right.double() + 1
    assert out.tolist() == expected.tolist()


def test_ldmatrix_transposes_and_stmatrix_is_its_reverse():
    given = np.arange(64, dtype=np.uint16).view(np.uint32)
    for trans in ("", ".trans"):
        out = np.zeros(32, np.uint32)
        body = f"""ld.global.b32 %r1, [%at_given]; st.shared.b32 [%near], %r1; bar.sync 0;
            and.b32 %r2, %lane, 7; shl.b32 %r2, %r2, 4;
            ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r3}}, [%r2];
            stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r2+512], {{%r3}};
            bar.sync 0; ld.shared.b32 %r4, [%near+512]; st.global.b32 [%at_out], %r4;
            bar.sync 0; st.shared.b32 [%near], %r3; ld.shared.b32 %r5, [%near];
            st.global.b32 [%at_register], %r5;"""
        register = np.zeros(32, np.uint32)
        run(body, given=given, out=out, register=register, written=("out", "register"))
        assert (out == given).all()
        matrix = given.view(np.uint16).reshape(8, 8)
        loaded = register.view(np.uint16).reshape(8, 8)
        assert (loaded == (matrix.T if trans else matrix)).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.fence.sync.aligned;",
        "cp.async.bulk.commit_group;",
        "mbarrier.init.shared.b64 [%near], 1;",
        "add.rz.f32 %r0, %r1, %r2;",
        "add.f64 %rd1, %rd2, %rd3;",
        "ld.acquire.gpu.global.b32 %r0, [%at_out];",
        "fence.acq_rel.gpu;",
        "shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xffff;",
        "bar.sync 1;",
        "mul.hi.u64 %rd1, %rd2, %rd3;",
        "cvt.rz.bf16.f32 %h1, %r1;",
        "nanosleep.u32 20;",
    ],
)
def test_what_is_left_out_is_refused_by_name(instruction):
    with pytest.raises(UnsupportedError, match=instruction.split()[0].rstrip(";")):
        run(instruction, out=np.zeros(32, np.uint32))


def test_the_text_is_read_as_it_is_written():
    kernel = parse(
        """
        // a comment { ; }
        .visible .entry name(.param .u64 .ptr .global .align 1 x, .param .f32 scale)
        .reqntid 64
        {
            .reg .b32 %r<3>; .reg .b64 %rd<2>;
            .loc 1 7 3 // kernel.py:7
            ld.param.u64 %rd1, [x];
            // begin inline asm
            @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 16 ];
            // end inline asm
        $L__end:
            ret;
        }
        .file 1 "/somewhere/kernel.py"
        .section .debug { .b8 0 }
        """
    )
    assert (kernel.name, kernel.threads) == ("name", 64)
    assert kernel.parameters == {"x": "u64", "scale": "f32"}
    assert [each.stem for each in kernel.instructions] == ["ld", "ld", "ret"]
    load = kernel.instructions[1]
    assert load.operands == ["{ %r1, %r2 }", "[ %rd1 + 16 ]"]
    assert load.guard == ("%p1", False)
    assert "kernel.py:7" in str(load)
    assert kernel.labels == {"$L__end": 2}
