"""What programs do, counted from their text: by hand, and against what was compiled."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qaperso import hlo
from qaperso.hlo import Array, Kernel

# As TPU compilers write it: a loop of three gathers and products, a fused reduce-scatter, memory spaces, async pairs.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,4]{1,0:T(8,128)(2,1)})->bf16[8,4]{1,0}}

%fused_product (param_0: bf16[8,4], param_1: bf16[3,16,4]) -> bf16[8,16] {
  %param_1 = bf16[3,16,4]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_0 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,16,4]{2,1,0} dynamic-slice(%param_1, %zero, %zero, %zero), dynamic_slice_sizes={1,16,4}
  %flat = bf16[16,4]{1,0} bitcast(%slice)
  ROOT %product = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%param_0, %flat), dim_labels=bf_oi->bf
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused_scatter (param_0.1: f32[32,4]) -> f32[8,4] {
  %param_0.1 = f32[32,4]{1,0} parameter(0)
  %all-reduce.7 = f32[32,4]{1,0} all-reduce(%param_0.1), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%sum
  %at = s32[] constant(0)
  ROOT %own = f32[8,4]{1,0} dynamic-slice(%all-reduce.7, %at, %at), dynamic_slice_sizes={8,4}
}

%fused_update (param_0.2: f32[3,8,4], param_1.2: f32[8,4]) -> f32[3,8,4] {
  %param_0.2 = f32[3,8,4]{2,1,0} parameter(0)
  %param_1.2 = f32[8,4]{1,0} parameter(1)
  %one = f32[1,8,4]{2,1,0} bitcast(%param_1.2)
  %where = s32[] constant(1)
  ROOT %put = f32[3,8,4]{2,1,0} dynamic-update-slice(%param_0.2, %one, %where, %where, %where)
}

%body (state: (bf16[8,4], bf16[3,16,4])) -> (bf16[8,4], bf16[3,16,4]) {
  %state = (bf16[8,4]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[3,16,4]{2,1,0}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=0
  %stack = bf16[3,16,4]{2,1,0} get-tuple-element(%state), index=1
  %near = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %fusion = bf16[8,16]{1,0} fusion(%near, %stack), kind=kOutput, calls=%fused_product
  %all-gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%fusion), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-gather-done = bf16[32,16]{1,0} all-gather-done(%all-gather-start)
  %back = bf16[8,4]{1,0} slice(%all-gather-done), slice={[0:8], [0:4]}
  ROOT %both = (bf16[8,4]{1,0}, bf16[3,16,4]{2,1,0}) tuple(%back, %stack)
}

%cond (state.1: (bf16[8,4], bf16[3,16,4])) -> pred[] {
  %state.1 = (bf16[8,4]{1,0}, bf16[3,16,4]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p0: bf16[8,4], p1: bf16[3,16,4], p2: f32[32,4], p3: f32[3,8,4]) -> f32[3,8,4] {
  %p0 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[3,16,4]{2,1,0} parameter(1)
  %p2 = f32[32,4]{1,0} parameter(2)
  %p3 = f32[3,8,4]{2,1,0} parameter(3)
  %start = (bf16[8,4]{1,0}, bf16[3,16,4]{2,1,0}) tuple(%p0, %p1)
  %while = (bf16[8,4]{1,0}, bf16[3,16,4]{2,1,0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce-scatter = f32[8,4]{1,0} fusion(%p2), kind=kCustom, calls=%fused_scatter
  ROOT %updated = f32[3,8,4]{2,1,0} fusion(%p3, %all-reduce-scatter), kind=kLoop, calls=%fused_update
}
"""


def test_by_hand() -> None:
    found = hlo.cost(TEXT)
    assert found.flops == 3 * 2 * 8 * 16 * 4
    gather, scatter = found.collectives
    assert (gather.kind, gather.arrays, gather.bytes) == ("all-gather", (Array("bf16", (32, 16)),), 1024)
    assert (gather.group, gather.times, gather.sent) == (4, 3, 768)
    assert (scatter.kind, scatter.bytes, scatter.group, scatter.times, scatter.sent) == (
        "reduce-scatter",
        512,
        4,
        1,
        384,
    )
    # A turn of the loop: x read; the product reads one slice of the stack, not what lies in fast memory; the gather; the slice.
    turn = 64 + (128 + 256) + (256 + 1024) + 2 * 64
    # Of the updated stack only what is new is written.
    assert found.hbm_bytes == 3 * turn + (512 + 128) + (128 + 128)


LOOP = """%fused_test (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%p.0, %p.1), direction=LT
}

%start (q: f32[2]) -> f32[8] {
  %q = f32[2]{0} parameter(0)
  ROOT %g1 = f32[8]{0} all-gather(%q), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%s), index=1
  %first = f32[8]{0} fusion(%x), kind=kCustom, calls=%start
  %second = f32[8]{0} fusion(%x), kind=kCustom, calls=%start
  %g2 = f32[8]{0} all-gather(%x), channel_id=10, replica_groups=[1,4]<=[4], dimensions={0}
  %j = s32[] get-tuple-element(%s), index=0
  %by = s32[] constant(STRIDE)
  %next = s32[] add(%j, %by)
  ROOT %t = (s32[], f32[2]{0}) tuple(%next, %x)
}

%cond (s.1: (s32[], f32[2])) -> pred[] {
  %s.1 = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %n = s32[] constant(7)
  ROOT TEST
}

ENTRY %main (a: (s32[], f32[2])) -> (s32[], f32[2]) {
  %a = (s32[], f32[2]{0}) parameter(0)
  ROOT %w = (s32[], f32[2]{0}) while(%a), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    "test, stride, times",
    [
        ("%less.1 = pred[] compare(%i, %n), direction=LT", 1, 7),
        ("%less.1 = pred[] compare(%i, %n), direction=LT", 2, 4),
        ("%fusion = pred[] fusion(%i, %n), kind=kLoop, calls=%fused_test", 1, 7),
        ("%less.1 = pred[] compare(%i, %i), direction=LT", 1, 1),
        ("%more = pred[] compare(%i, %n), direction=GT", 1, 1),
        ("%both = pred[] and(%i, %n)", 1, 1),
    ],
)
def test_loops_without_a_written_count_and_gathers_beside_kernels(test: str, stride: int, times: int) -> None:
    found = hlo.cost(LOOP.replace("TEST", test).replace("STRIDE", str(stride))).collectives
    assert [(c.channel, c.times) for c in found] == [(9, times), (10, times)]


BESIDE = """%slices (all: f32[32,8], i: s32[]) -> f32[8] {
  %all = f32[32,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%first (p.0: f32[2], p.1: f32[8], p.2: f32[32,8], p.3: s32[]) -> (f32[8], f32[2], f32[8]) {
  %p.0 = f32[2]{0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %p.2 = f32[32,8]{1,0} parameter(2)
  %p.3 = s32[] parameter(3)
  %g = f32[8]{0} all-gather(%p.0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  %own = f32[8]{0} fusion(%p.2, %p.3), kind=kLoop, calls=%slices
  %twice = f32[8]{0} add(%own, %own)
  ROOT %t = (f32[8]{0}, f32[2]{0}, f32[8]{0}) tuple(%twice, %p.0, %g)
}

%last (q.0: f32[2], q.1: f32[8]) -> f32[8] {
  %q.0 = f32[2]{0} parameter(0)
  %q.1 = f32[8]{0} parameter(1)
  %h = f32[8]{0} all-gather(%q.0), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = f32[8]{0} custom-call(%q.0, %q.1, %h), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[2], b: f32[8], c: f32[32,8], i: s32[]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %c = f32[32,8]{1,0} parameter(2)
  %n = s32[]{:S(2)} parameter(3)
  %k = (f32[8]{0}, f32[2]{0}, f32[8]{0}) fusion(%a, %b, %c, %n), kind=kCustom, calls=%first
  %x = f32[2]{0} get-tuple-element(%k), index=1
  %y = f32[8]{0} get-tuple-element(%k), index=2
  ROOT %z = f32[8]{0} fusion(%x, %y), kind=kCustom, calls=%last
}
"""


def test_traffic_of_kernels_within_kernels_and_beside_communication() -> None:
    """A row of 32 read and one written by the kernel; the gathered array arrives once, whichever kernels list it."""
    found = hlo.cost(BESIDE)
    assert found.hbm_bytes == (32 + 32) + 32 and len(found.collectives) == 1


TPU = """ENTRY %main (q: bf16[2,3,4,256,8], k: bf16[2,3,1,256,8], m: s8[1,2,2], x: f32[6,8]) -> f32[6,8] {
  %q = bf16[2,3,4,256,8]{4,3,2,1,0} parameter(0)
  %k = bf16[2,3,1,256,8]{4,3,2,1,0} parameter(1)
  %m = s8[1,2,2]{2,1,0:S(1)} parameter(2)
  %x = f32[6,8]{1,0} parameter(3)
  %room = f32[6,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %slice-start = ((f32[6,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:8]}
  %slice-done = f32[2,8]{1,0:S(1)} slice-done(%slice-start)
  %copy-start = (f32[6,8]{1,0:S(1)}, f32[6,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[6,8]{1,0:S(1)} copy-done(%copy-start)
  %splash_mha_KIND_segmented.1 = bf16[2,3,4,256,8]{4,3,2,1,0} custom-call(%m, %m, %q, %k), custom_call_target="tpu_custom_call"
  ROOT %sum = f32[6,8]{1,0} add(%room, %copy-done)
}
"""


@pytest.mark.parametrize("kind, products", [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_and_what_moves_beside_kernels(kind: str, products: int) -> None:
    """Of 2 x 2 blocks one lies in the future. Room is no traffic; of what is prefetched only the part, and as a transfer."""
    attention, plain = (found := hlo.cost(TPU.replace("KIND", kind))).kernels
    assert attention.flops == found.flops == products * 2 * (2 * 3 * 4 * 256 * 256 * 8) * 3 / 4
    assert attention.bytes == 2 * (2 * 3 * 4 * 256 * 8) * 2 + (2 * 3 * 256 * 8) * 2
    assert plain == (0.0, 2 * 192, 1) and found.transfers == 64 + 192
    assert found.hbm_bytes == attention.bytes + 2 * 192 + 64 + 192


def test_attention_of_a_single_row() -> None:
    """XLA drops dimensions of 1: a device with one row and one tower."""
    single = TPU.replace("2,3,4,256,8]{4,3,2,1,0}", "4,256,8]{2,1,0}").replace(
        "2,3,1,256,8]{4,3,2,1,0}", "1,256,8]{2,1,0}"
    )
    assert hlo.cost(single.replace("KIND", "fwd")).flops == 2 * 2 * (4 * 256 * 256 * 8) * 3 / 4


@pytest.mark.parametrize("target, products", [("fmhaScaleBiasSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
@pytest.mark.parametrize("mask, share", [("CAUSAL", 0.5), ("NO_MASK", 1.0)])
def test_attention_of_cudnn(target: str, products: int, mask: str, share: float) -> None:
    # Two query heads read each key-value head.
    text = """ENTRY %main (q: bf16[3,8,4,16], k: bf16[3,8,2,16]) -> bf16[3,4,8,16] {
  %q = bf16[3,8,4,16]{3,2,1,0} parameter(0)
  %k = bf16[3,8,2,16]{3,2,1,0} parameter(1)
  ROOT %a = (bf16[3,4,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$TARGET", backend_config=CONFIG
}
"""
    config = '{"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["3", "4", "8", "8"]}, "mask_type": "MASK"'
    config += ', "bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions":["3"]}}}'
    written = text.replace("CONFIG", config).replace("TARGET", target).replace("MASK", mask)
    assert hlo.cost(written).flops == products * share * 2 * 3 * 4 * 8 * 8 * 16


def test_strings_of_arrays() -> None:
    assert str(Array("f32", (3, 8))) == "f32[3,8]" and str(Array("s32", ())) == "s32[]"
    assert Array("pred", (3, 8)).bytes == 24 and Array("token", ()).bytes == 0


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("layers", [1, 5])
def test_scans_count_as_often_as_they_run(layers: int) -> None:
    def place(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh(), PartitionSpec(*spec))

    def run(x: jax.Array, kernels: jax.Array) -> jax.Array:
        def body(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), place("x")), None

        return jax.lax.scan(body, x, kernels)[0]

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("x"))
    kernels = jax.ShapeDtypeStruct((layers, 32, 32), jnp.float32, sharding=place(None, "x"))
    found = hlo.cost(jax.jit(run).lower(x, kernels).compile().as_text())
    assert found.flops == layers * 2 * 8 * 32 * 32
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert sum(c.sent * c.times for c in gathers) == layers * 32 * 32 * 4 * 7 / 8
    assert {c.group for c in gathers} == {8}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','fsdp'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_groups_in_every_spelling(groups: str, size: int) -> None:
    text = f"""ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%sum
}}
"""
    assert hlo.cost(text).collectives == (hlo.Collective("all-reduce", (Array("f32", (8,)),), 32.0, size, channel=1),)


def test_products_of_a_batch() -> None:
    text = """ENTRY %main (a: f32[3,4,5], b: f32[3,5,6]) -> f32[3,4,6] {
  %a = f32[3,4,5]{2,1,0} parameter(0)
  %b = f32[3,5,6]{2,1,0} parameter(1)
  ROOT %d = f32[3,4,6]{2,1,0} DOT
}
"""
    dot = "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    gemm = 'custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{'
    gemm += '"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}'
    found = hlo.Cost((Kernel(2 * 3 * 4 * 5 * 6, 4 * 3 * (4 * 5 + 5 * 6 + 4 * 6)),))
    assert hlo.cost(text.replace("DOT", dot)) == hlo.cost(text.replace("DOT", gemm)) == found
    # GPUs give such a product room to work in, or write it as a kernel of Triton with what stands around it.
    room = text.replace("%d = f32[3,4,6]{2,1,0} DOT", "%d = (f32[3,4,6]{2,1,0}, s8[4194304]{0}) DOT").replace(
        "DOT", gemm
    )
    assert hlo.cost(room) == found
    body = text.replace("ENTRY %main", "%gemm").replace("DOT", dot)
    call = "fusion(%a, %b), kind=kCustom, calls=%gemm, backend_config={}"
    assert hlo.cost(body + text.replace("DOT", call)) == found


def test_kernels_that_run_beside_others() -> None:
    """As GPUs write them, their operands before what they give: slices are transfers, products are kernels like any."""
    text = """%slice (p: f32[5,4,6], i: s32[]) -> f32[1,4,6] {
  %p = f32[5,4,6]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %cut = f32[1,4,6]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,4,6}
}

%product (l: f32[4,6], r: f32[6,3]) -> f32[4,3] {
  %l = f32[4,6]{1,0} parameter(0)
  %r = f32[6,3]{1,0} parameter(1)
  ROOT %dot = f32[4,3]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[5,4,6], at: s32[], w: f32[6,3]) -> f32[4,3] {
  %x = f32[5,4,6]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %w = f32[6,3]{1,0} parameter(2)
  %fusion-start = ((f32[5,4,6]{2,1,0}, s32[]), f32[1,4,6]{2,1,0}, u32[]) fusion-start(%x, %at), kind=kLoop, calls=%slice
  %fusion-done = f32[1,4,6]{2,1,0} fusion-done(%fusion-start)
  %layer = f32[4,6]{1,0} bitcast(%fusion-done)
  %fusion-start.1 = ((f32[4,6]{1,0}, f32[6,3]{1,0}), f32[4,3]{1,0}, u32[]) fusion-start(%layer, %w), kind=kCustom, calls=%product
  ROOT %fusion-done.1 = f32[4,3]{1,0} fusion-done(%fusion-start.1)
}
"""
    # The slice reads and writes 24 numbers, and reads its place.
    assert hlo.cost(text) == hlo.Cost((Kernel(2.0 * 4 * 6 * 3, 4.0 * (24 + 18 + 12)),), 4.0 * (24 + 24 + 1))


@settings(max_examples=50, deadline=None)
@given(
    *(st.integers(1, 6) for _ in range(3)),
    *(st.integers(1, 3) for _ in range(3)),
    *(st.integers(0, 3) for _ in range(2)),
)
def test_products_of_a_convolution(size, kernel, channels, stride, spread, step, low, high) -> None:
    padded = (size - 1) * spread + 1 + low + high
    window = (kernel - 1) * step + 1
    out = (padded - window) // stride + 1
    if out < 1:
        return
    # Which places of the padded, dilated input hold an element.
    held = np.zeros(padded, bool)
    held[low : low + (size - 1) * spread + 1 : spread] = True
    products = sum(held[o * stride + k * step] for o in range(out) for k in range(kernel))
    options = f"size={kernel} stride={stride} pad={low}_{high} lhs_dilate={spread} rhs_dilate={step}"
    text = f"""ENTRY %main (a: f32[2,{channels},{size}], b: f32[5,{channels},{kernel}]) -> f32[2,5,{out}] {{
  %a = f32[2,{channels},{size}]{{2,1,0}} parameter(0)
  %b = f32[5,{channels},{kernel}]{{2,1,0}} parameter(1)
  ROOT %c = f32[2,5,{out}]{{2,1,0}} convolution(%a, %b), window={{{options}}}, dim_labels=bf0_oi0->bf0
}}
"""
    assert hlo.cost(text).flops == 2 * 2 * 5 * channels * products


def test_the_costliest_branch_counts() -> None:
    text = """%dear (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%free (b: f32[4,4]) -> f32[4,4] {
  ROOT %b = f32[4,4]{1,0} parameter(0)
}

ENTRY %main (p: pred[], x: f32[4,4]) -> f32[4,4] {
  %p = pred[] parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  ROOT %c = f32[4,4]{1,0} conditional(%p, %x, %x), BRANCHES
}
"""
    for written in ("true_computation=%dear, false_computation=%free", "branch_computations={%free, %dear}"):
        assert hlo.cost(text.replace("BRANCHES", written)).flops == 2 * 4**3


@pytest.mark.parametrize("kind, share", [("all-reduce", 1.5), ("all-to-all", 0.75), ("collective-permute", 1.0)])
def test_bytes_sent(kind: str, share: float) -> None:
    assert hlo.Collective(kind, (), 100.0, 4).sent == 100 * share
    assert math.isclose(hlo.Collective(kind, (), 100.0, 4, times=7).sent, 100 * share)
