"""exp, log and the logistic function in Triton, to about an ulp and with the same bits on every device.

`tl.exp`, `tl.log` and `/` are the chip's approximations: e^x = ex2.approx(x log2 e) is off by |x| half-ulps, lg2.approx
loses all relative accuracy near 1, div.full takes up to 2 ulp more. For the few gates of a model exactness costs
nothing, and then what the interpreter computes is what the GPU computes (in kernels with `enable_fp_fusion=False`).
Polynomials of Cephes (expf, logf) in float32.
"""

import triton
import triton.language as tl

__all__ = ["accurate_exp", "accurate_log", "accurate_sigmoid"]

_LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # 9 bits: its product with an exponent is exact
_LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)


@triton.jit
def accurate_exp(x):
    """e^x for float32 x; below -87 and above 88 as there. A NaN stays one."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    n = tl.floor(x * 1.44269504088896341 + 0.5)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + r + 1.0
    n = tl.where(x == x, n, 0.0)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return p * power


@triton.jit
def accurate_log(x):
    """ln x for normal positive float32 x. A NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [1/2, 1)
    small = mantissa < 0.707106781186547524
    exponent = ((bits >> 23) - tl.where(small, 127, 126)).to(tl.float32)
    r = tl.where(small, mantissa + mantissa, mantissa) - 1.0
    p = r * 7.0376836292e-2 - 1.1514610310e-1
    p = p * r + 1.1676998740e-1
    p = p * r - 1.2420140846e-1
    p = p * r + 1.4249322787e-1
    p = p * r - 1.6668057665e-1
    p = p * r + 2.0000714765e-1
    p = p * r - 2.4999993993e-1
    p = p * r + 3.3333331174e-1
    square = r * r
    p = p * r * square + exponent * _LN2_LOW - 0.5 * square
    return tl.where(x == x, (r + p) + exponent * _LN2_HIGH, x)


@triton.jit
def accurate_sigmoid(x):
    """1 / (1 + e^-x); below -88 as there. A NaN stays one."""
    denominator = 1.0 + accurate_exp(-x)
    return tl.div_rn(tl.zeros_like(denominator) + 1.0, denominator)
