"""Collectives of a compiled program, read from texts cut down from what the compilers of a TPU and a GPU wrote."""

from experiments.bench.collectives import Collective, collectives, told

TPU = """\
HloModule jit_step, is_scheduled=true

%begin.1 (p: bf16[32,128]) -> (bf16[32,128], bf16[128,128], u32[]) {
  %p = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.5 = bf16[128,128]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %custom-call.6 = (bf16[32,128]{1,0}, bf16[128,128]{1,0}, u32[]) custom-call(%all-gather.5)
}

%inner (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%async_collective_fusion.9 (a: f32[8,8], b: f32[8,8], c: bf16[128,128]) -> (f32[8,8], bf16[128,128]) {
  %all-gather.6 = bf16[128,128]{1,0} all-gather(%c), channel_id=7, dimensions={0}
  %fusion.20 = f32[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%inner
  ROOT %tuple.1 = (f32[8,8]{1,0}, bf16[128,128]{1,0}) tuple(%fusion.20, %all-gather.6)
}

%all-reduce-scatter.3 (input: f32[4096,128]) -> f32[1024,128] {
  %all-reduce.1 = f32[4096,128]{1,0} all-reduce(%input), channel_id=55, to_apply=%add
  ROOT %slice = f32[1024,128]{1,0} dynamic-slice(%all-reduce.1)
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main.1_spmd (param.0: f32[8,8]) -> f32[8,8] {
  %async-collective-start.1 = (bf16[32,128]{1,0}, bf16[128,128]{1,0}, u32[]) fusion(%p0), calls=%begin.1
  %get-tuple-element.1 = bf16[128,128]{1,0} get-tuple-element(%async-collective-start.1), index=1
  %fusion.4 = f32[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%inner
  %fusion.5 = (f32[8,8]{1,0}, bf16[128,128]{1,0}) fusion(%a, %b), calls=%async_collective_fusion.9, metadata={}
  %add.1 = f32[8,8]{1,0} add(%a, %b)
  %async-collective-done.1 = bf16[128,128]{1,0} fusion(%get-tuple-element.1), kind=kCustom, calls=%finish
  %fusion.6 = f32[1024,128]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.3
  %all-reduce.2 = (f32[128]{0}, f32[]) all-reduce(%d, %e), channel_id=8, to_apply=%add
  ROOT %collective-permute-start.3 = (f32[8]{0}, f32[8]{0}) collective-permute-start(%f), channel_id=9
  %collective-permute-done.7 = f32[8]{0} collective-permute-done(%collective-permute-start.3)
}
"""
GPU = """\
ENTRY %main.1 (param.0: f32[8,8]) -> f32[8,8] {
  %reduce-scatter-start.1 = ((f32[8]), f32[2]) reduce-scatter-start(%p0), channel_id=1, to_apply=%add
  %all-gather-start.2 = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p1), channel_id=2, dimensions={0}
  %gemm.3 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %reduce-scatter-done.9 = f32[2]{0} reduce-scatter-done(((f32[8]), f32[2]) %reduce-scatter-start.1)
  %gemm.4 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a, %c), custom_call_target="__cublas$lt$matmul"
  ROOT %all-gather-done.8 = f32[8,8]{1,0} all-gather-done(%all-gather-start.2)
}
"""


def test_of_a_tpu():
    found = collectives(TPU)
    assert found == [
        Collective("all-gather", True, 2),  # the addition is no product
        Collective("reduce-scatter", False),
        Collective("all-reduce", False),
        Collective("collective-permute", True, 0),
    ]
    assert told(found) == (
        "1 all-gather (1 asynchronous, 1 beside products), 1 all-reduce (0 asynchronous, 0 beside products), "
        "1 reduce-scatter (0 asynchronous, 0 beside products), "
        "1 collective-permute (1 asynchronous, 0 beside products)"
    )


def test_of_a_gpu():
    assert collectives(GPU) == [Collective("reduce-scatter", True, 1), Collective("all-gather", True, 2)]
    assert told([]) == "none"
