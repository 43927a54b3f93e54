"""The mathematics of the LSTM rule for one block of coordinates: [coordinates, units], in float32 or float64.

Units are padded to a power of 2. Weights of padded units are zero, and whatever leaves a cell is masked: zero times
infinity would be NaN. At least three columns are padding, and there the constant inputs go: a one and the features, so
biases and W_ih of the first layer are columns of the first matrix product, and of its gradient. Nothing here needs
libdevice in float32, so the interpreter runs the very same code; launches switch contraction off, so only the
multiply-adds that are written are fused.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # the first 15 bits of log(2): times an exponent, exact
LN2_LOW = tl.constexpr(1.4286068203094173e-06)
# (tanh(x) - x) / x^3 as a polynomial in x^2 for |x| < 0.625: relative errors of 2e-8 and 4e-17.
TANH_F32 = tl.constexpr(
    (-0.006096714165908197, 0.020997178999074752, -0.05385090957851358, 0.13332769736976327, -0.33333328944134255)
)
TANH_F64 = tl.constexpr(
    (
        -1.724487449484433e-05,
        7.959955735264808e-05,
        -0.00023077616269519857,
        0.0005874372860094381,
        -0.001455309297534642,
        0.0035920589774734554,
        -0.008863229830925709,
        0.021869488260559115,
        -0.05396825396139557,
        0.13333333333326658,
        -0.3333333333333332,
    )
)
LOG_F32 = tl.constexpr((2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))  # of artanh


@triton.jit
def polynomial(x, coefficients: tl.constexpr, COUNT: tl.constexpr):
    """Highest coefficient first."""
    value = tl.full(x.shape, coefficients[0], x.dtype)
    for i in tl.static_range(1, COUNT):
        value = tl.fma(value, x, tl.full(x.shape, coefficients[i], x.dtype))
    return value


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def tanh(x):
    """Accurate near 0, where 1 - 2 / (exp(2x) + 1) is not; NaN takes that branch."""
    magnitude = tl.abs(x)
    square = x * x
    if x.dtype == tl.float64:
        series = polynomial(square, TANH_F64, 11)
    else:
        series = polynomial(square, TANH_F32, 5)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.625, tl.fma(series * square, x, x), tl.where(x < 0, -far, far))


@triton.jit
def log(x):
    """Natural logarithm of a positive x, denormal numbers included; infinity and NaN come back as they are."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        denormal = x < 1.1754943508222875e-38
        bits = tl.where(denormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F400000) >> 23
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)  # in [0.75, 1.5): accurate around 1
        power = exponent.to(tl.float32) - tl.where(denormal, 23.0, 0.0)
        s = (mantissa - 1.0) / (mantissa + 1.0)  # log(m) = 2 artanh(s)
        square = s * s
        low = tl.fma(polynomial(square, LOG_F32, 5) * square, s, power * LN2_LOW)
        result = tl.where(x <= 3.4028234663852886e38, power * LN2_HIGH + ((s + s) + low), x)
    return result


@triton.jit
def features(gradient, constant, threshold, slope, LOG_SIGN: tl.constexpr):
    """Both inputs of the first layer, [coordinates] each; "raw" has only the first. reference.py says what they are."""
    if LOG_SIGN:
        magnitude = tl.abs(gradient)
        large = magnitude >= threshold
        small = tl.where(gradient == gradient, -1.0, gradient)
        first = tl.where(large, log(magnitude) / constant, small.to(gradient.dtype))
        sign = tl.where(gradient < 0, -1.0, 1.0).to(gradient.dtype)
        second = tl.where(large, sign, gradient * slope)
    else:
        first, second = constant * gradient, tl.zeros_like(gradient)
    return first, second


@triton.jit
def features_backward(gradient, dfirst, dsecond, constant, threshold, slope, LOG_SIGN: tl.constexpr):
    """d gradient from d features."""
    if LOG_SIGN:
        large = tl.abs(gradient) >= threshold
        dgradient = tl.where(large, dfirst / (constant * gradient), dsecond * slope)
    else:
        dgradient = constant * dfirst
    return dgradient


@triton.jit
def beside(a, b):
    """[rows, n] twice as one [rows, 2n]: what a thread holds stays with it."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def halves(x):
    """The inverse of beside()."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def extend(h, first, second, units, FIRST: tl.constexpr, HIDDEN: tl.constexpr):
    """h with the constant inputs in the columns after it: a one, the input of the bias, and the features."""
    units = units[None, :]
    h = tl.where(units == HIDDEN, 1.0, h)
    if FIRST:
        h = tl.where(units == HIDDEN + 1, first[:, None], h)
        h = tl.where(units == HIDDEN + 2, second[:, None], h)
    return h


@triton.jit
def gate_sum(at, gate, h, x, FIRST: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """bias + W_hh h + W_ih x of one gate."""
    units = tl.arange(0, UNITS)
    at += (gate * UNITS + units[None, :]) * (2 * UNITS) + units[:, None]
    total = tl.dot(h, tl.load(at), input_precision=PRECISION, out_dtype=h.dtype)
    if not FIRST:
        total = tl.dot(x, tl.load(at + UNITS), total, input_precision=PRECISION, out_dtype=h.dtype)
    return total


@triton.jit
def gate_sums(
    at, h, x, FIRST: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The sums of the gates i, f, g, o of the layer whose packed weights are at `at`; h is extended.

    Hopper's matrix instructions take the weights from shared memory, all gates at once if WIDE; others from registers,
    where only one gate's have room.
    """
    if WIDE:
        inputs = h if FIRST else beside(h, x)
        rows = tl.arange(0, 4 * UNITS)
        columns = tl.arange(0, inputs.shape[1])
        matrix = tl.load(at + rows[None, :] * (2 * UNITS) + columns[:, None])
        i_f, g_o = halves(tl.dot(inputs, matrix, input_precision=PRECISION, out_dtype=h.dtype))
        i, f = halves(i_f)
        g, o = halves(g_o)
    else:
        i = gate_sum(at, 0, h, x, FIRST, UNITS, PRECISION)
        f = gate_sum(at, 1, h, x, FIRST, UNITS, PRECISION)
        g = gate_sum(at, 2, h, x, FIRST, UNITS, PRECISION)
        o = gate_sum(at, 3, h, x, FIRST, UNITS, PRECISION)
    return i, f, g, o


@triton.jit
def activate(i, f, g, o, c, units, HIDDEN: tl.constexpr):
    """The new h and c of a layer from its gates' sums, zero in padded units."""
    exists = (units < HIDDEN)[None, :]
    c = tl.where(exists, tl.fma(sigmoid(f), c, sigmoid(i) * tanh(g)), 0.0)
    return tl.where(exists, sigmoid(o) * tanh(c), 0.0), c
