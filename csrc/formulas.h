// What the parts of a rule compute, forward and back, for a number or a vector of them: each formula once, for every
// instruction set and for CUDA. reference.py says what they are.
//
// Included inside a namespace that has FORMULA (how functions are declared) and, for policies P: P::V and P::T (a
// vector and its elements, or the same), P::set1, P::fma, P::over (a quotient of a constant), logarithm<P> and root<P>.

// The logarithm and the sign of a gradient, or on a linear scale what is too small.
template <class P>
FORMULA void log_sign(const PartConstants<typename P::T>& constants, typename P::V g, typename P::V& first,
                      typename P::V& second) {
  using V = typename P::V;
  const V one = P::set1(1), zero = P::set1(0);
  const V magnitude = g < zero ? -g : g;
  const auto large = magnitude >= P::set1(constants.threshold);
  first = large ? P::over(logarithm<P>(magnitude), constants.p, constants.inverse_p) : (g == g ? -one : g);
  second = large ? (g < zero ? -one : one) : g * P::set1(constants.slope);
}

template <class P>
FORMULA typename P::V log_sign_backward(const PartConstants<typename P::T>& constants, typename P::V g,
                                        typename P::V dfirst, typename P::V dsecond) {
  using V = typename P::V;
  const V magnitude = g < P::set1(0) ? -g : g;
  const auto large = magnitude >= P::set1(constants.threshold);
  return large ? dfirst / (P::set1(constants.p) * g) : dsecond * P::set1(constants.slope);
}

// The same without a switch, as TensorFlow code has it.
template <class P>
FORMULA void log_and_sign(const PartConstants<typename P::T>& constants, typename P::V g, typename P::V& first,
                          typename P::V& second) {
  using V = typename P::V;
  const V one = P::set1(1), magnitude = (g < P::set1(0) ? -g : g) + P::set1((typename P::T)0x1p-23);
  const V log = P::over(logarithm<P>(magnitude), constants.p, constants.inverse_p),
          linear = g * P::set1(constants.slope);
  first = log < -one ? -one : log;
  second = linear < -one ? -one : (linear > one ? one : linear);
}

template <class P>
FORMULA typename P::V log_and_sign_backward(const PartConstants<typename P::T>& constants, typename P::V g,
                                            typename P::V dfirst, typename P::V dsecond) {
  using V = typename P::V;
  const V zero = P::set1(0), one = P::set1(1), sign = g < zero ? -one : one;
  const V magnitude = sign * g + P::set1((typename P::T)0x1p-23), linear = sign * g * P::set1(constants.slope);
  const V log = P::over(logarithm<P>(magnitude), constants.p, constants.inverse_p);
  const V dlog = sign * dfirst / (P::set1(constants.p) * magnitude), dlinear = dsecond * P::set1(constants.slope);
  return (log < -one ? zero : (g == zero ? zero : dlog)) + (linear > one ? zero : dlinear);
}

// The state of Adam's features: means of the gradient and of its square, and their ages, which are the means of ones.
// With one age both are the same.
template <class P>
struct Means {
  typename P::V m, v, age1, age2;
};

// Brings the means up to date, and gives the mean and the gradient over the root of the mean square.
template <class P>
FORMULA void adam(const PartConstants<typename P::T>& constants, typename P::V g, Means<P>& means, typename P::V& first,
                  typename P::V& second) {
  using V = typename P::V;
  const V beta1 = P::set1(constants.beta1), new1 = P::set1(constants.new1);
  const V beta2 = P::set1(constants.beta2), new2 = P::set1(constants.new2);
  means.m = P::fma(beta1, means.m, new1 * g);
  means.v = P::fma(beta2, means.v, new2 * g * g);
  means.age1 = P::fma(beta1, means.age1, new1);
  means.age2 = constants.one_age ? means.age1 : P::fma(beta2, means.age2, new2);
  const V unit = root<P>(means.v / means.age2) + P::set1(constants.epsilon);
  first = means.m / means.age1 / unit;
  second = g / unit;
}

// From the gradients of what adam() gave, and of the means after it, those of the means before it and of g. Where the
// mean square is 0 nothing goes through its root.
template <class P>
FORMULA typename P::V adam_backward(const PartConstants<typename P::T>& constants, typename P::V g,
                                    const Means<P>& after, typename P::V dfirst, typename P::V dsecond,
                                    Means<P>& dmeans) {
  using V = typename P::V;
  const V zero = P::set1(0), two = P::set1(2);
  const V square = after.v / after.age2, deviation = root<P>(square), unit = deviation + P::set1(constants.epsilon);
  const V mean = after.m / after.age1, dmean = dfirst / unit;
  const V dunit = -(dfirst * (mean / unit) + dsecond * (g / unit)) / unit;
  const V dsquare = square == zero ? zero : dunit / (two * deviation);
  const V dm = dmeans.m + dmean / after.age1, dv = dmeans.v + dsquare / after.age2;
  const V dage1 = dmeans.age1 - dmean * mean / after.age1, dage2 = dsquare * square / after.age2;
  dmeans.m = P::set1(constants.beta1) * dm;
  dmeans.v = P::set1(constants.beta2) * dv;
  dmeans.age1 = P::set1(constants.beta1) * (constants.one_age ? dage1 - dage2 : dage1);
  dmeans.age2 = P::set1(constants.beta2) * (dmeans.age2 - dage2);
  return dsecond / unit + P::fma(P::set1(constants.new1), dm, two * P::set1(constants.new2) * g * dv);
}

// The features of a gradient, of which raw has one; means are brought up to date, for features that have some.
template <class P>
FORMULA void features(const PartConstants<typename P::T>& constants, typename P::V g, Means<P>& means,
                      typename P::V (&to)[2]) {
  to[0] = to[1] = P::set1(0);
  switch (constants.features) {
    case Features::kNone: return;
    case Features::kRaw: to[0] = P::set1(constants.scale) * g; return;
    case Features::kLogSign: return log_sign<P>(constants, g, to[0], to[1]);
    case Features::kLogAndSign: return log_and_sign<P>(constants, g, to[0], to[1]);
    case Features::kAdam: return adam<P>(constants, g, means, to[0], to[1]);
  }
}

// d gradient from d features; `dmeans` are the gradients of the means `after` the step, and then of those before it.
template <class P>
FORMULA typename P::V features_backward(const PartConstants<typename P::T>& constants, typename P::V g,
                                        const Means<P>& after, const typename P::V (&dfeatures)[2], Means<P>& dmeans) {
  switch (constants.features) {
    case Features::kNone: break;
    case Features::kRaw: return P::set1(constants.scale) * dfeatures[0];
    case Features::kLogSign: return log_sign_backward<P>(constants, g, dfeatures[0], dfeatures[1]);
    case Features::kLogAndSign: return log_and_sign_backward<P>(constants, g, dfeatures[0], dfeatures[1]);
    case Features::kAdam: return adam_backward<P>(constants, g, after, dfeatures[0], dfeatures[1], dmeans);
  }
  return P::set1(0);
}

// Of exp(x) - 1, or x where that is positive, the gradient of x from that of y.
template <class P>
FORMULA typename P::V elu_backward(typename P::V y, typename P::V dy) {
  return y > P::set1(0) ? dy : P::fma(dy, y, dy);
}

template <class P>
FORMULA typename P::V tanh_backward(typename P::V y, typename P::V dy) {
  return P::fma(-dy * y, y, dy);
}

// The new c of an LSTM's unit.
template <class P>
FORMULA typename P::V cell(typename P::V i, typename P::V f, typename P::V g, typename P::V c) {
  return P::fma(f, c, i * g);
}

// From the gradient of a unit's h and that of its c, which becomes that of c before the step, those of its gates' sums.
template <class P>
FORMULA void cell_backward(typename P::V i, typename P::V f, typename P::V g, typename P::V o, typename P::V tanh_c,
                           typename P::V c_before, typename P::V dh, typename P::V& dc, typename P::V (&dgates)[4]) {
  using V = typename P::V;
  const V one = P::set1(1), dtanh = dh * o;
  const V dc_now = P::fma(-dtanh * tanh_c, tanh_c, dc + dtanh);
  dgates[0] = dc_now * g * i * (one - i);
  dgates[1] = dc_now * c_before * f * (one - f);
  dgates[2] = dc_now * i * P::fma(-g, g, one);
  dgates[3] = dh * tanh_c * o * (one - o);
  dc = dc_now * f;
}
