"""Which attention kernels run while training."""

from __future__ import annotations

import torch
from torch.backends.cuda import flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from madtp.training.attention_kernels import inference_kernels, training_kernels

CPU = torch.device("cpu")


def test_the_fused_kernel_runs_only_without_gradients() -> None:
    with training_kernels(CPU, bfloat16=True):
        assert (flash_sdp_enabled(), math_sdp_enabled()) == (False, True)
        with inference_kernels():
            assert (flash_sdp_enabled(), math_sdp_enabled()) == (True, True)
            assert not torch.is_grad_enabled()
        assert (flash_sdp_enabled(), math_sdp_enabled()) == (False, True)
        assert torch.is_grad_enabled()
    assert flash_sdp_enabled()


def test_what_the_user_switched_off_stays_off() -> None:
    with (
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        training_kernels(CPU, bfloat16=True),
        inference_kernels(),
    ):
        assert (flash_sdp_enabled(), mem_efficient_sdp_enabled()) == (True, False)
    with sdpa_kernel(SDPBackend.MATH), inference_kernels():
        assert not flash_sdp_enabled()


def test_float32_keeps_every_kernel() -> None:
    with training_kernels(CPU, bfloat16=False):
        assert flash_sdp_enabled()


def test_kernels_agree() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    with training_kernels(CPU, bfloat16=True):
        wanted = scaled_dot_product_attention(q, k, v)
        with inference_kernels():
            torch.testing.assert_close(scaled_dot_product_attention(q, k, v), wanted)
