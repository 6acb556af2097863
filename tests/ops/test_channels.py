"""Memory layout, widths and grids that the fused operations share."""

import pytest
import torch

from gac.errors import InputError
from gac.ops import channels
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import ELEMENTS, Kernel
from ops import fused

KERNEL = Kernel("norm_lif.cu", "not launched", ())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 2, 3, 4, 5), (6, 1, 3, 1, 5), (1, 2, 1, 4, 5), (6, 2, 3, 1, 1)])
@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_channels_last(shape: tuple[int, ...], layout: str) -> None:
    x = fused.laid_out(fused.normal(shape, 0), layout)
    result = channels.channels_last(x)
    assert torch.equal(result, x)
    assert fused.is_channels_last(result)
    assert (result.data_ptr() == x.data_ptr()) == fused.is_channels_last(x)
    empty = channels.empty_channels_last(x.shape, x.half())
    assert (empty.shape, empty.dtype) == (x.shape, torch.float16)
    assert fused.is_channels_last(empty)


def test_strides_of_single_elements_do_not_matter() -> None:
    x = torch.zeros(2, 1, 8, 1, 1).as_strided((2, 1, 8, 1, 1), (8, 99, 1, 77, 55))
    assert channels.channels_last(x) is x


def test_rows_are_the_pixels_of_a_frame() -> None:
    assert channels.rows(torch.zeros(6, 2, 8, 3, 4)) == 2 * 3 * 4


@pytest.mark.parametrize("T", range(1, channels.MAX_T + 1))
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_width_is_at_most_one_16_byte_access(dtype: torch.dtype, T: int) -> None:
    width = channels.vector_width(dtype, T)
    assert width in (1, 2, 4, 8)
    assert width * dtype.itemsize <= 16


def test_fitting_width() -> None:
    x, parameter = torch.zeros(32), torch.zeros(32)
    assert channels.fitting_width(6, 48, x, None, parameter) == 4
    assert channels.fitting_width(6, 48, x.half(), parameter) == 8
    assert [channels.fitting_width(6, length, x.half()) for length in (4, 20, 6, 7)] == [4, 4, 2, 1]
    assert channels.fitting_width(6, 7, x) == 1
    # What the addresses allow: of half precision and of the float32 beside it.
    half = x.half()
    assert [channels.fitting_width(6, 48, half[offset:]) for offset in (8, 4, 2, 1)] == [8, 4, 2, 1]
    assert [channels.fitting_width(6, 48, half, parameter[offset:]) for offset in (4, 2, 1)] == [8, 2, 1]
    for unaligned in [(x[1:], parameter), (x, parameter[1:])]:
        assert channels.fitting_width(6, 48, *unaligned) == 1


@pytest.mark.parametrize("resident", [1, 3, 7, 1000])
@pytest.mark.parametrize("C", [1, 7, 8, 48, 512, 520, 1040])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_grid_covers_channels_and_gives_every_block_a_row(
    rows: int, C: int, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "resident_blocks", lambda *_: resident)
    width = 4 if C % 4 == 0 else 1
    blocks, columns = channels.grid(KERNEL, rows, C, width, torch.device("cpu"))
    lanes = min(C // width, channels.THREADS)
    assert (columns - 1) * lanes * width < C <= columns * lanes * width
    # The kernel of the statistics reads each block's first row without asking.
    assert (blocks - 1) * (channels.THREADS // lanes) < rows
    assert blocks * columns <= max(resident, columns)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"x must be a non-empty \[T, B, C, H, W\], got shape \[\]"),
        ((6, 2, 8, 4), r"got shape \[6, 2, 8, 4\]"),
        ((6, 2, 0, 4, 4), r"got shape \[6, 2, 0, 4, 4\]"),
        ((17, 1, 1, 1, 1), "the fused operations take up to 16 time steps, got 17; use backend='torch'"),
    ],
)
def test_bad_activations(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        channels.check_activations("x", torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_activations_that_do_not_match() -> None:
    x = torch.zeros(6, 2, 8, 4, 4)
    channels.check_activations("x", x, like=x.clone())
    for other in (x[:5], x.half(), x.to("meta")):
        with pytest.raises(InputError, match=r"x must be .* like the other input, got "):
            channels.check_activations("x", x, like=other)
