"""The profile benchmark: it must add up, and its rules must know the names that kernels have."""

import json
import time

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import equality, profile
from benchmarks.profile import (
    IDLE,
    OTHER,
    divide_time,
    kernel_group,
    operator_group,
    our_kernels,
    profile_steps,
    what_ran,
)
from gac.ops.cuda.compiler import KERNEL_FOLDER

CPU = torch.device("cpu")
SMALL = [
    *("--device", "cpu", "--precision", "fp32", "--time-steps", "2", "--batch", "2", "--warmup", "2", "--steps", "2"),
    *("--width", "4", "--depth", "1", "1", "1", "--image-size", "8", "--num-classes", "3"),
]


@pytest.mark.parametrize("step", ["training", "evaluation"])
def test_measures_and_reports(step, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--step", step, "--implementations", "ours-cupy", "ours-torch", "step-loop"]
    status = profile.main([*arguments, "--json", str(file)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(file.read_text())
    assert [each["implementation"] for each in report["breakdowns"]] == ["ours-torch", "step-loop"]
    for each in report["breakdowns"]:
        groups = each["groups"]
        assert sum(group["ms"] for group in groups.values()) == pytest.approx(each["profiled_ms"])
        for group in groups.values():
            assert sum(group["names"].values()) == pytest.approx(group["ms"])
        assert "aten::conv2d" in groups["convolutions"]["names"]
        backward = any("Backward" in name for name in groups["convolutions"]["names"])
        assert backward == (step == "training")
        assert ("optimiser and loss scaling" in groups) == (step == "training")
        assert groups[IDLE]["ms"] > 0
    assert f"ours-torch, NCHW: {step} step" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "both"], "invalid choice: 'both'"),
        (["--precision", "fp16"], "nothing can run, fp16: needs a CUDA device"),
        (["--implementations", "convolution-floor"], "invalid choice: 'convolution-floor'"),
        (["--warmup", "1"], "argument --warmup: expected a whole number >= 2"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert profile.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void norm_lif_forward<Float16, 6, 8, (Reset)0>(Float16 const*, float const*)", "norm_lif_forward"),
        ("lif_backward<float, 6, true, 4, Reset::hard, true, false, Rect>", "lif_backward"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolutions"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1", "matrix products"),
        ("sm80_xmma_gemm_fprop_f16f16_f16f32_f32_tn_n_tilesize128x128x32", "convolutions"),
        ("void cudnn::ops::nhwcToNchwKernel<__half, __half, float>(float)", "layout conversions"),
        ("void cudnn::bn_fw_tr_1C11_singleread<__half, 512, true>(float)", "BatchNorm"),
        ("void at::native::batch_norm_backward_reduce_channels_last_kernel<4, float>()", "BatchNorm"),
        ("_forward_kernel", "neurons (SpikingJelly)"),
        ("_backward_kernel", "neurons (SpikingJelly)"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedSgdMathFunctor<float>>",
            "optimiser and loss scaling",
        ),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, true, false>()", "loss"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNN", "matrix products"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>", "copies and casts"),
        ("Memset (Device)", "copies and casts"),
        ("void at::native::elementwise_kernel<128, 4, at::native::clamp_min_kernel_impl>()", "element by element"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>", "element by element"),
        ("void someone_elses_kernel<float>()", OTHER),
    ],
)
def test_kernels_are_grouped_by_name(name, group):
    assert kernel_group(name) == group


def test_all_kernels_of_this_package_are_known():
    declared = sum(path.read_text().count("__global__ ") for path in KERNEL_FOLDER.glob("*.cu"))
    assert len(our_kernels()) == declared
    assert {"lif_forward", "norm_lif_backward_sums", "probe"} <= our_kernels()


@pytest.mark.parametrize(
    ("name", "ancestors", "group"),
    [
        ("aten::mul", [], "element by element"),
        ("aten::mul", ["sj_lif::forward"], "neurons (SpikingJelly)"),
        ("aten::add_", ["aten::_foreach_add_", "Optimizer.step#SGD.step"], "optimiser and loss scaling"),
        ("aten::empty", ["aten::mkldnn_convolution", "aten::convolution", "aten::conv2d"], "convolutions"),
        ("aten::sum", ["autograd::engine::evaluate_function: SumBackward1"], "reductions"),
        ("aten::detach", [], OTHER),
    ],
)
def test_operators_are_grouped_by_name_and_place(name, ancestors, group):
    assert operator_group([*reversed(ancestors), name]) == group


def test_time_of_overlapping_kernels_is_divided():
    shares, idle = divide_time([(0, 10), (5, 15), (5, 15), (20, 25), (25, 30)])
    assert shares == pytest.approx([5 + 5 / 3, 5 / 3 + 5 / 2, 5 / 3 + 5 / 2, 5, 5])
    assert idle == 5
    assert sum(shares) + idle == pytest.approx(30)


def test_what_ran_on_the_gpu():
    def event(name: str, device: DeviceType, **more: bool) -> FunctionEvent:
        return FunctionEvent(0, name, 0, 10.5, 12.5, device_type=device, **more)

    events = [
        event("k", DeviceType.CUDA),
        event("Memcpy DtoD", DeviceType.CUDA),
        event("Optimizer.step", DeviceType.CUDA, is_user_annotation=True),
        event("aten::mul", DeviceType.CPU),
    ]
    assert what_ran(events) == (["k", "Memcpy DtoD"], [(10.5, 12.5)] * 2)


def test_a_wait_is_idle_time():
    def step() -> None:
        torch.mm(x, x)
        time.sleep(0.02)

    x = torch.ones(8, 8)
    groups = profile_steps(step, 3, CPU)
    assert groups[IDLE]["ms"] >= 20
    assert groups["matrix products"]["ms"] > 0


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, capsys, monkeypatch):
    # They are part of the suite that this test is part of.
    monkeypatch.setattr(equality, "run_tests", lambda paths, report, marker: None)
    file = tmp_path / "result.json"
    arguments = [*SMALL[2:], "--device", "cuda", "--precision", "fp16", "--json", str(file)]
    assert profile.main(arguments) == 0, capsys.readouterr().err
    breakdowns = {each["implementation"]: each for each in json.loads(file.read_text())["breakdowns"]}
    assert set(breakdowns) == set(profile.NETWORKS) - {"ours-c"}
    assert {"norm_lif_forward", "residual_lif_backward_sums"} <= set(breakdowns["ours-cupy"]["groups"])
    assert not our_kernels() & set(breakdowns["spikingjelly"]["groups"])
