"""The parts of the profile that need no GPU."""

import pytest

from benchmarks import step_profile

HLO = """\
HloModule step

%fused_add (a: f32[4,8], b: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  ROOT %add = f32[4,8]{1,0} add(%a, %b)
}

ENTRY %main (x: f32[4,8], y: bf16[8,2]) -> bf16[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = bf16[8,2]{1,0} parameter(1)
  %sum = f32[4,8]{1,0} fusion(%x, %x), kind=kLoop, calls=%fused_add
  %product = (bf16[4,2]{1,0}, s8[1024]{0}) custom-call(%sum, %y), custom_call_target="__cublas"
  ROOT %result = bf16[4,2]{1,0} get-tuple-element(%product), index=0
}
"""


def test_bytes_are_those_of_operands_and_results_of_kernels():
    read_and_written = 2 * 4 * 8 * 4  # an operand that is read twice counts once
    product = 4 * 8 * 4 + 2 * 8 * 2 + 2 * 4 * 2
    assert step_profile.moved_bytes(HLO) == read_and_written + product


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16", "convolutions"),
        ("nvjet_sm90_tst_128x272_64x4_2x1_h_bz_NNN", "products of matrices"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "products of matrices"),
        ("forward_kernel", "loss"),
        ("input_reduce_select_fusion_3", "reductions"),
        ("input_convert_transpose_fusion", "transposes, copies"),
        ("loop_maximum_fusion_98", "element-wise"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert step_profile.kind_of(kernel) == kind


def test_options_are_those_of_xla():
    options = step_profile._options("xla_gpu_enable_triton_gemm=false,xla_gpu_autotune_level=1")
    assert options == {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": "1"}
