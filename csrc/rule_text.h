// From a rule's text to its parts: the same grammar as fastl2l/rule_config.py, which a test holds this against.
//
//     [features] [given:rows] [projection:units] lstm:units,... output
#pragma once

#include <charconv>
#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "rule.h"

namespace fastl2l {

constexpr int kMostUnits = 1 << 15, kMostLayers = 64;
constexpr size_t kMostText = 1000;

inline bool takes_logarithm(const Rule& rule) {
  return rule.features == Features::kLogSign || rule.features == Features::kLogAndSign;
}

class RuleParser {
 public:
  explicit RuleParser(const std::string& text) : text_(text) {}

  Rule parse() {
    require(text_.size() <= kMostText, "expected at most " + std::to_string(kMostText) + " characters");
    split();
    Rule rule;
    read_features(rule);
    if (next_is("given")) rule.given = units(take(1).numbers[0]);
    if (next_is("elu")) {
      rule.projection = Projection::kElu;
      rule.projected = units(take(1).numbers[0]);
    }
    require(next_is("lstm"), "expected the parts [raw|log_sign|log_and_sign|adam] [given] [elu] lstm linear|tanh|none");
    read_layers(rule);
    read_output(rule);
    require(next_ == parts_.size(), "expected nothing after the output");
    require(rule.inputs() > 0, "expected features of the gradient, given rows or both, got neither");
    return rule;
  }

 private:
  struct Part {
    std::string_view name;
    std::vector<std::string_view> numbers;
  };

  void require(bool condition, const std::string& message) const {
    if (!condition) throw std::runtime_error("rule '" + text_.substr(0, 100) + "': " + message);
  }

  static std::vector<std::string_view> split_at(std::string_view text, char separator) {
    std::vector<std::string_view> found;
    for (size_t begin = 0;;) {
      const size_t end = text.find(separator, begin);
      found.push_back(text.substr(begin, end - begin));
      if (end == text.npos) return found;
      begin = end + 1;
    }
  }

  void split() {
    for (const std::string_view word : split_at(text_, ' ')) {
      const size_t colon = word.find(':');
      Part part{word.substr(0, colon), {}};
      if (colon != word.npos) part.numbers = split_at(word.substr(colon + 1), ',');
      parts_.push_back(part);
    }
  }

  bool next_is(std::string_view name) const { return next_ < parts_.size() && parts_[next_].name == name; }

  Part take() { return parts_[next_++]; }
  Part take(size_t count) {
    const Part part = take();
    require(part.numbers.size() == count, std::string(part.name) + ": expected " + std::to_string(count) +
                                              " numbers, got " + std::to_string(part.numbers.size()));
    return part;
  }

  // Digits, perhaps a point and more of them, perhaps an exponent; in no locale.
  double number(std::string_view text) const {
    double value = 0;
    const auto digit = [](char c) { return c >= '0' && c <= '9'; };
    const bool plain = !text.empty() && digit(text.front()) && digit(text.back()) &&
                       text.find_first_not_of("0123456789.e+-") == text.npos && text.find(".e") == text.npos;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(plain && error == std::errc() && end == text.data() + text.size() && std::isfinite(value) && value > 0,
            "expected a finite positive number, got " + std::string(text));
    return value;
  }

  int units(std::string_view text) const {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    require(error == std::errc() && end == text.data() + text.size() && value >= 1 && value <= kMostUnits,
            "expected units from 1 to " + std::to_string(kMostUnits) + ", got " + std::string(text));
    return value;
  }

  void read_features(Rule& rule) {
    static const struct {
      const char* name;
      Features features;
      size_t constants;
    } kAll[] = {{"raw", Features::kRaw, 1},
                {"log_sign", Features::kLogSign, 1},
                {"log_and_sign", Features::kLogAndSign, 1},
                {"adam", Features::kAdam, 3}};
    for (const auto& one : kAll) {
      if (!next_is(one.name)) continue;
      const Part part = take(one.constants);
      rule.features = one.features;
      for (size_t i = 0; i < one.constants; ++i) rule.constants[i] = number(part.numbers[i]);
      break;
    }
    if (takes_logarithm(rule)) require(rule.constants[0] <= 87, "expected p or k of at most 87");
    if (rule.features == Features::kAdam) {
      require(rule.constants[0] < 1 && rule.constants[1] < 1, "expected beta1 and beta2 below 1");
    }
  }

  void read_layers(Rule& rule) {
    const Part part = take();
    require(!part.numbers.empty() && part.numbers.size() <= (size_t)kMostLayers,
            "lstm: expected 1 to " + std::to_string(kMostLayers) + " layers");
    rule.layers = (int)part.numbers.size();
    for (const std::string_view layer : part.numbers) {
      require(rule.hidden == 0 || units(layer) == rule.hidden, "lstm: expected as many units in every layer");
      rule.hidden = units(layer);
    }
  }

  void read_output(Rule& rule) {
    require(next_is("linear") || next_is("tanh") || next_is("none"), "expected the output linear, tanh or none");
    const std::string_view name = take(0).name;
    rule.output = name == "linear" ? Output::kLinear : (name == "tanh" ? Output::kTanh : Output::kNone);
  }

  const std::string& text_;
  std::vector<Part> parts_;
  size_t next_ = 0;
};

// The parts of the rule of this text; std::runtime_error with the text if there is no such rule. A thread keeps the
// last one: steps ask for the same rule again and again.
inline const Rule& parse_rule(const std::string& text) {
  static thread_local std::string last;
  static thread_local Rule rule;
  if (text.empty() || text != last) {
    rule = RuleParser(text).parse();
    last = text;
  }
  return rule;
}

template <typename T>
PartConstants<T> part_constants(const Rule& rule) {
  const double p = takes_logarithm(rule) ? rule.constants[0] : 0;
  return {rule, std::exp(-p), std::exp(p)};
}

}  // namespace fastl2l
