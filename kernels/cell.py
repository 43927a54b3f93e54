"""The mathematics of a rule for one block of coordinates: [coordinates, units], in float32 or float64.

Units are padded to a power of 2. Weights of padded units are zero, and whatever leaves a cell is masked: zero times
infinity would be NaN. At least three columns are padding, and there the constant inputs go: a one and, where the first
layer reads features as they are, those: so biases and its W_ih are columns of the first matrix product, and of its
gradient. Nothing here needs libdevice in float32, so the interpreter runs the very same code; launches switch
contraction off, so only the multiply-adds that are written are fused. ``RULE`` is a launch.Shape.
"""

import triton
import triton.language as tl

from fastl2l.kernels.layout import TILE

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
def elu(x):
    """exp(x) - 1, or x where that is positive; accurate near 0, as tanh is."""
    t = tanh(0.5 * x)
    return tl.where(x > 0, x, 2.0 * t / (1.0 - t))


@triton.jit
def elu_backward(y, dy):
    """d x from elu(x) and its gradient."""
    return tl.where(y > 0, dy, dy + dy * y)


@triton.jit
def tanh_backward(y, dy):
    """d x from tanh(x) and its gradient."""
    return tl.fma(-dy * y, y, dy)


@triton.jit
def root(x):
    """Square root, denormal numbers included."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


# Features. reference.py says what they are; their constants are in the order of launch.Rule.constants.


@triton.jit
def log_sign(gradient, constants):
    p, threshold, slope = constants[0], constants[1], constants[2]
    magnitude = tl.abs(gradient)
    large = magnitude >= threshold
    small = tl.where(gradient == gradient, -1.0, gradient)
    first = tl.where(large, log(magnitude) / p, small.to(gradient.dtype))
    sign = tl.where(gradient < 0, -1.0, 1.0).to(gradient.dtype)
    return first, tl.where(large, sign, gradient * slope)


@triton.jit
def log_sign_backward(gradient, dfirst, dsecond, constants):
    p, threshold, slope = constants[0], constants[1], constants[2]
    return tl.where(tl.abs(gradient) >= threshold, dfirst / (p * gradient), dsecond * slope)


@triton.jit
def log_and_sign(gradient, constants):
    p, slope = constants[0], constants[2]
    logarithm = log(tl.abs(gradient) + 1.1920928955078125e-07) / p
    linear = gradient * slope
    first = tl.where(logarithm < -1.0, -1.0, logarithm)
    return first.to(gradient.dtype), tl.where(linear < -1.0, -1.0, tl.where(linear > 1.0, 1.0, linear)).to(
        gradient.dtype
    )


@triton.jit
def log_and_sign_backward(gradient, dfirst, dsecond, constants):
    p, slope = constants[0], constants[2]
    magnitude = tl.abs(gradient) + 1.1920928955078125e-07
    sign = tl.where(gradient < 0, -1.0, 1.0).to(gradient.dtype)
    dlog = tl.where((log(magnitude) / p < -1.0) | (gradient == 0), 0.0, sign * dfirst / (p * magnitude))
    return dlog + tl.where(tl.abs(gradient) * slope > 1.0, 0.0, dsecond * slope)


@triton.jit
def adam(gradient, means, constants, COUNT: tl.constexpr):
    """Both features, and the means up to date: of the gradient, of its square, and of ones, once or for each."""
    beta1, beta2, new1, new2, epsilon = constants[0], constants[1], constants[2], constants[3], constants[4]
    m = beta1 * means[0] + new1 * gradient
    v = beta2 * means[1] + new2 * gradient * gradient
    age1 = beta1 * means[2] + new1
    if COUNT == 3:
        age2, means = age1, (m, v, age1)
    else:
        age2 = beta2 * means[3] + new2
        means = (m, v, age1, age2)
    unit = root(v / age2) + epsilon
    return m / age1 / unit, gradient / unit, means


@triton.jit
def adam_backward(gradient, means, dfirst, dsecond, dmeans, constants, COUNT: tl.constexpr):
    """d gradient and d means before a step, from the means after it and their gradients.

    Where the mean square is 0 nothing goes through its root.
    """
    beta1, beta2, new1, new2, epsilon = constants[0], constants[1], constants[2], constants[3], constants[4]
    age1, age2 = means[2], means[COUNT - 1]
    square, mean = means[1] / age2, means[0] / age1
    deviation = root(square)
    unit = deviation + epsilon
    dmean = dfirst / unit
    dunit = -(dfirst * (mean / unit) + dsecond * (gradient / unit)) / unit
    dsquare = tl.where(square == 0, 0.0, dunit / (2.0 * deviation))
    dm = dmeans[0] + dmean / age1
    dv = dmeans[1] + dsquare / age2
    dage1 = dmeans[2] - dmean * mean / age1
    dage2 = dsquare * square / age2
    if COUNT == 3:
        dmeans = (beta1 * dm, beta2 * dv, beta1 * (dage1 - dage2))
    else:
        dmeans = (beta1 * dm, beta2 * dv, beta1 * dage1, beta2 * (dmeans[3] - dage2))
    return dsecond / unit + (new1 * dm + 2.0 * new2 * gradient * dv), dmeans


@triton.jit
def features(gradient, means, constants, RULE: tl.constexpr):
    """Two features, [coordinates] each, and the new means; a rule that has fewer features does not look at the rest."""
    if RULE.features == "adam":
        first, second, means = adam(gradient, means, constants, RULE.means)
    elif RULE.features == "log_sign":
        first, second = log_sign(gradient, constants)
    elif RULE.features == "log_and_sign":
        first, second = log_and_sign(gradient, constants)
    elif RULE.features == "raw":
        first, second = constants[0] * gradient, tl.zeros_like(gradient)
    else:
        first, second = tl.zeros_like(gradient), tl.zeros_like(gradient)
    return first, second, means


@triton.jit
def features_backward(gradient, means, dfirst, dsecond, dmeans, constants, RULE: tl.constexpr):
    """d gradient and d means before a step, from the means after it, d features and d means after it."""
    if RULE.features == "adam":
        dgradient, dmeans = adam_backward(gradient, means, dfirst, dsecond, dmeans, constants, RULE.means)
    elif RULE.features == "log_sign":
        dgradient = log_sign_backward(gradient, dfirst, dsecond, constants)
    elif RULE.features == "log_and_sign":
        dgradient = log_and_sign_backward(gradient, dfirst, dsecond, constants)
    elif RULE.features == "raw":
        dgradient = constants[0] * dfirst
    else:
        dgradient = tl.zeros_like(gradient)
    return dgradient, dmeans


@triton.jit
def project(first, second, given, at, exists, weights, units, RULE: tl.constexpr):
    """What the first layer reads, [coordinates, units]: features and given rows, or what is projected of them.

    ``at``: offsets of the coordinates' first row in ``given``, if there are any; ``weights``: those of the projection.
    """
    COUNT: tl.constexpr = RULE.feature_count
    UNITS: tl.constexpr = RULE.units
    STRIDE: tl.constexpr = 2 * UNITS  # of packed weights
    if RULE.projected > 0:
        x = tl.zeros([first.shape[0], UNITS], first.dtype) + tl.load(weights + units)[None, :]
        if COUNT > 0:
            x = tl.fma(first[:, None], tl.load(weights + STRIDE + units)[None, :], x)
        if COUNT > 1:
            x = tl.fma(second[:, None], tl.load(weights + 2 * STRIDE + units)[None, :], x)
        if RULE.given > 0:
            for k in range(RULE.given):
                row = tl.load(given + at + k * TILE, mask=exists, other=0.0)
                x = tl.fma(row[:, None], tl.load(weights + (1 + COUNT + k) * STRIDE + units)[None, :], x)
        # Weights of padded units are zero: an infinite feature makes them NaN.
        x = tl.where((units < RULE.projected)[None, :], elu(x), 0.0)
    else:
        x = tl.zeros([first.shape[0], UNITS], first.dtype)
        if RULE.given > 0:
            row = units - COUNT
            mask = exists[:, None] & ((row >= 0) & (row < RULE.given))[None, :]
            x = tl.load(given + at[:, None] + row[None, :] * TILE, mask=mask, other=0.0)
        if COUNT > 0:
            x = tl.where((units == 0)[None, :], first[:, None], x)
        if COUNT > 1:
            x = tl.where((units == 1)[None, :], second[:, None], x)
    return x


@triton.jit
def project_backward(x, dx, units, RULE: tl.constexpr):
    """d of the projection's sums, from what the first layer reads and its gradient."""
    if RULE.projected > 0:
        dx = tl.where((units < RULE.projected)[None, :], elu_backward(x, dx), 0.0)
    return dx


@triton.jit
def column(x, units, unit):
    """[coordinates] of [coordinates, units]."""
    return tl.sum(tl.where((units == unit)[None, :], x, 0.0), 1)


# LSTM


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
def cell(i, f, g, o, c, units, HIDDEN: tl.constexpr):
    """The new h and c of a layer from its gates' sums, zero in padded units."""
    exists = (units < HIDDEN)[None, :]
    c = tl.where(exists, tl.fma(sigmoid(f), c, sigmoid(i) * tanh(g)), 0.0)
    return tl.where(exists, sigmoid(o) * tanh(c), 0.0), c


@triton.jit
def cell_backward(i, f, g, o, c, tanh_c, dh, dc, is_unit):
    """d sums of the gates and d c before a step, from the gates, c before it and the new c's tanh.

    Infinity in a coordinate makes its padded units NaN; these must not reach the others of its row.
    """
    dtanh = dh * o
    dc += tl.fma(-dtanh * tanh_c, tanh_c, dtanh)
    di = tl.where(is_unit, dc * g * i * (1.0 - i), 0.0)
    df = tl.where(is_unit, dc * c * f * (1.0 - f), 0.0)
    dg = tl.where(is_unit, dc * i * tl.fma(-g, g, tl.full(g.shape, 1.0, g.dtype)), 0.0)
    do = tl.where(is_unit, dh * tanh_c * o * (1.0 - o), 0.0)
    return di, df, dg, do, tl.where(is_unit, dc * f, 0.0)


@triton.jit
def output(h, weights, units, RULE: tl.constexpr):
    """w_out h + b_out or its tanh, [coordinates]; h is extended, and ``weights`` are those of the output."""
    out = tl.sum(h * tl.load(weights + units)[None, :], 1)
    if RULE.output == "tanh":
        out = tanh(out)
    return out


@triton.jit
def output_backward(h, doutput, weights, units, RULE: tl.constexpr):
    """d (w_out h + b_out)."""
    if RULE.output == "tanh":
        doutput = tanh_backward(output(h, weights, units, RULE), doutput)
    return doutput
