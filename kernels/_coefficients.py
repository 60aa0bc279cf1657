"""Polynomials of the exact normals: the one Python copy, read by the reference and by the Triton kernels.

``csrc/random.h`` spells the same float32 numbers in C++; the tests that compare bits across backends tie the two together.
All are minimax fits in the relative error (Remez), rounded to float32.

* LOG: -2 ln(1 + f) / f in powers of f on [sqrt(1/2) - 1, sqrt(2) - 1]; error 2.6e-8.
* SIN: sin(pi t / 4) / t and COS: cos(pi t / 4), in powers of t**2 on [0, 1]; errors 3.2e-9 and 5.6e-11.
"""

LOG = (
    -2.0,
    0.9999997615814209,
    -0.6666837334632874,
    0.5000414848327637,
    -0.39913666248321533,
    0.33124786615371704,
    -0.2990453243255615,
    0.28733691573143005,
    -0.1744471937417984,
)
SIN = (0.7853981852531433, -0.08074543625116348, 0.00249000103212893, -3.59504520019982e-05)
COS = (1.0, -0.3084251284599304, 0.015854323282837868, -0.0003259365039411932, 3.52876168108196e-06)
MINUS_2_LN_2 = -1.3862943649291992
SQRT_HALF_BITS = 0x3F3504F3
"""Float32 bits of sqrt(1/2): the mantissa of a logarithm's argument is brought into [sqrt(1/2), sqrt(2))."""
