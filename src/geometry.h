// From XLA's buffers and attributes to one checked description of the call, the same for CPU and
// CUDA. The checks are for memory safety; the Python side raises the errors that people meet.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "warp.h"
#include "xla/ffi/api/ffi.h"

namespace jaxwarp {

namespace ffi = xla::ffi;

constexpr int kMaxBatch = 6;

// A buffer and its element strides along the batch axes of the call; a size-1 axis has stride 0.
struct Operand {
  void* data = nullptr;
  ffi::DataType dtype = ffi::DataType::INVALID;
  int64_t stride[kMaxBatch] = {};
  int64_t count = 0;
  int64_t first_sum = 0;  // its place among the sums of a deterministic call
  bool output = false;    // written, not read
  bool summed = false;    // an output with stride 0 along an axis that others have: the sum over it
};

inline int64_t size_of(ffi::DataType dtype) { return static_cast<int64_t>(ffi::ByteWidth(dtype)); }

struct Batch {
  int rank = 0;
  int64_t size[kMaxBatch] = {};
  int64_t count = 1;

  JAXWARP_HD int64_t offset(int64_t b, const int64_t* stride) const {
    int64_t sum = 0;
    for (int i = rank - 1; i > 0; --i) {
      sum += b % size[i] * stride[i];
      b /= size[i];
    }
    return rank > 0 ? sum + b * stride[0] : 0;  // one axis takes no division
  }
};

// Which operands a handler takes; "?" marks those that may be absent. "T" is the storage type of
// the values, "A" their accumulator's and that of positions and weights, "P" that of the points.
// "scratch" is memory without meaning that a deterministic call with sums needs, uint32 (N,).
struct Signature {
  const char* name;
  const char* inputs;
  const char* outputs;
};
inline constexpr Signature kGather = {"jaxwarp_gather", "image:T points:P importance:A? peak:A?",
                                      "values:T"};
inline constexpr Signature kGatherTangent = {
    "jaxwarp_gather_tangent",
    "image:T points:P importance:A? peak:A? d_image:T? d_points:A? d_importance:A?", "d_values:T"};
inline constexpr Signature kGatherVjp = {"jaxwarp_gather_vjp", "image:T points:P ct_values:T",
                                         "ct_image:A? ct_points:A scratch:U?"};
inline constexpr Signature kGatherVjpTangent = {
    "jaxwarp_gather_vjp_tangent",
    "image:T points:P ct_values:T d_image:T? d_points:A? d_ct_values:T?", "d_ct_points:A"};
inline constexpr Signature kSplat = {"jaxwarp_splat", "values:T points:P importance:A? peak:A?",
                                     "image:A coverage:A? weight:A? peak:A? scratch:U?"};
inline constexpr Signature kSplatTangent = {
    "jaxwarp_splat_tangent",
    "values:T points:P importance:A? image:A? coverage:A? weight:A? peak:A? "
    "d_values:T? d_points:A? d_importance:A?",
    "d_image:A d_coverage:A? scratch:U?"};
inline constexpr Signature kSplatVjp = {
    "jaxwarp_splat_vjp",
    "values:T points:P importance:A? ct_image:T image:A? coverage:A? weight:A? peak:A? "
    "ct_coverage:A?",
    "ct_values:T? ct_points:A? ct_importance:A?"};

struct Call {
  Sampling sampling;
  bool displacement;  // points are a flow field: position = pixel + flow
  bool deterministic;
  bool channels_first;
  Reduce reduce;
  double min_coverage;
  int dims;
  ffi::DataType value_type;
  Shape<int64_t> shape;
  Batch batch;
  Operand image, points, values, importance, coverage, weight, peak;
  Operand d_image, d_points, d_values, d_importance, d_coverage;
  Operand ct_image, ct_points, ct_values, ct_importance, ct_coverage;
  Operand d_ct_points, d_ct_values;
  void* scratch;
  int64_t sums;  // elements of all outputs that are sums over the points

  JAXWARP_HD int64_t offset(const Operand& operand, int64_t b) const {
    return batch.offset(b, operand.stride);
  }
};

// What a kernel reads and writes, of batch element b; null where the operand is absent. C: Call, or
// what knows more.
template <class T, class C>
JAXWARP_HD T* at(const C& call, const Operand& operand, int64_t b) {
  if (operand.data == nullptr) return nullptr;
  return static_cast<T*>(operand.data) + call.offset(operand, b);
}

template <class A, Importances K = Importances::kAny, class C>
JAXWARP_HD ImportanceField<A, K> importances_of(const C& call, int64_t b) {
  return {at<const A>(call, call.importance, b), at<const A>(call, call.peak, b)};
}

template <int D, class A, class C>
JAXWARP_HD PointTangents<D, A> point_tangents_of(const C& call, int64_t b) {
  return {at<const A>(call, call.d_points, b), at<const A>(call, call.d_importance, b)};
}

template <class A, class C>
JAXWARP_HD SplatResidual<A> splat_residual_of(const C& call, int64_t b) {
  return {at<const A>(call, call.image, b), at<const A>(call, call.coverage, b),
          at<const A>(call, call.weight, b), static_cast<A>(call.min_coverage)};
}

inline std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> words;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    if (end > 0) words.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return words;
}

using Dims = ffi::Span<const int64_t>;

inline Dims slice(Dims dims, size_t begin, size_t count) { return {dims.begin() + begin, count}; }

inline std::string to_text(Dims dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + ")";
}

class Decoder {
 public:
  // A platform where the order of additions is not fixed needs scratch to be deterministic.
  Decoder(const Signature& signature, Call& call, bool needs_scratch = false)
      : signature_(signature), call_(call), needs_scratch_(needs_scratch) {}

  ffi::Error decode(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs) {
    read_options(attrs);
    read_operands("inputs", signature_.inputs, args.size(), attrs,
                  [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); });
    read_operands("outputs", signature_.outputs, rets.size(), attrs,
                  [&](size_t i) { return **rets.get<ffi::AnyBuffer>(i); });
    if (error_.empty()) read_shapes();
    if (error_.empty()) merge_batch_axes();
    if (error_.empty()) check_combination();
    if (error_.empty()) place_sums();
    return error_.empty()
               ? ffi::Error::Success()
               : ffi::Error::InvalidArgument(std::string(signature_.name) + ": " + error_);
  }

 private:
  // The axes of an operand behind its batch axes.
  enum class Kind { kImage, kPlane, kPoints, kValues, kScalars };
  struct Slot {
    std::string_view name;
    Kind kind;
    Operand Call::* operand;
  };
  static constexpr Slot kSlots[] = {
      {"image", Kind::kImage, &Call::image},
      {"points", Kind::kPoints, &Call::points},
      {"values", Kind::kValues, &Call::values},
      {"importance", Kind::kScalars, &Call::importance},
      {"coverage", Kind::kPlane, &Call::coverage},
      {"weight", Kind::kPlane, &Call::weight},
      {"peak", Kind::kPlane, &Call::peak},
      {"d_image", Kind::kImage, &Call::d_image},
      {"d_points", Kind::kPoints, &Call::d_points},
      {"d_values", Kind::kValues, &Call::d_values},
      {"d_importance", Kind::kScalars, &Call::d_importance},
      {"d_coverage", Kind::kPlane, &Call::d_coverage},
      {"ct_image", Kind::kImage, &Call::ct_image},
      {"ct_points", Kind::kPoints, &Call::ct_points},
      {"ct_values", Kind::kValues, &Call::ct_values},
      {"ct_importance", Kind::kScalars, &Call::ct_importance},
      {"ct_coverage", Kind::kPlane, &Call::ct_coverage},
      {"d_ct_points", Kind::kPoints, &Call::d_ct_points},
      {"d_ct_values", Kind::kValues, &Call::d_ct_values},
  };
  struct Bound {
    const Slot* slot;
    char dtype;
    bool output;
    ffi::AnyBuffer buffer;
  };

  void fail(std::string text) {
    if (error_.empty()) error_ = std::move(text);
  }

  template <class T>
  T attribute(ffi::Dictionary attrs, std::string_view name) {
    auto value = attrs.get<T>(name);
    if (value.has_value()) return *value;
    fail("attribute " + std::string(name) + " is missing or of another type");
    return T{};
  }

  template <class E, size_t N>
  E choice(std::string_view name, std::string_view got, const std::string_view (&names)[N]) {
    for (size_t i = 0; i < N; ++i) {
      if (names[i] == got) return static_cast<E>(i);
    }
    fail("unknown " + std::string(name) + " '" + std::string(got) + "'");
    return E{};
  }
  template <class E, size_t N>
  E choice(ffi::Dictionary attrs, std::string_view name, const std::string_view (&names)[N]) {
    return choice<E>(name, attribute<std::string_view>(attrs, name), names);
  }

  // One word for each axis, or one for all.
  void read_boundaries(ffi::Dictionary attrs) {
    static constexpr std::string_view kNames[] = {"constant", "nearest", "mirror", "reflect",
                                                  "wrap"};
    const auto words = split(attribute<std::string_view>(attrs, "boundary"));
    boundaries_ = words.size();
    if (words.empty()) return fail("boundary is missing");
    for (size_t a = 0; a < 3; ++a) {
      const auto word = words[std::min(a, words.size() - 1)];
      call_.sampling.boundary[a] = choice<Boundary>("boundary", word, kNames);
    }
  }

  void read_options(ffi::Dictionary attrs) {
    static constexpr std::string_view kMethods[] = {"nearest", "linear", "cubic"};
    static constexpr std::string_view kReductions[] = {"sum", "average", "softmax"};
    call_.sampling.method = choice<Method>(attrs, "method", kMethods);
    read_boundaries(attrs);
    call_.sampling.fill = attribute<double>(attrs, "fill_value");
    call_.sampling.cubic_a = attribute<double>(attrs, "cubic_a");
    call_.reduce = choice<Reduce>(attrs, "reduce", kReductions);
    call_.min_coverage = std::max(0.0, attribute<double>(attrs, "min_coverage"));
    call_.displacement = attribute<bool>(attrs, "displacement");
    call_.deterministic = attribute<bool>(attrs, "deterministic");
    call_.channels_first = attribute<bool>(attrs, "channels_first");
    const auto order = attribute<ffi::Span<const int64_t>>(attrs, "derivative");
    if (order.size() > 3) fail("derivative has more than 3 entries");
    for (size_t a = 0; a < 3; ++a) {
      const int64_t k = a < order.size() ? order[a] : 0;
      if (k < 0 || k > 1000)
        fail("derivative order " + std::to_string(k) + " is not within 0 to 1000");
      call_.sampling.order[a] = static_cast<int>(k);
    }
  }

  // Matches the buffers with the names that the caller lists, in the same order, in attribute
  // `which`.
  template <class Get>
  void read_operands(const char* which, std::string_view signature, size_t count,
                     ffi::Dictionary attrs, Get get) {
    const auto given = split(attribute<std::string_view>(attrs, which));
    if (given.size() != count) {
      return fail(std::string(which) + " names " + std::to_string(given.size()) +
                  " operands, got " + std::to_string(count) + " buffers");
    }
    const auto name_of = [](std::string_view entry) { return entry.substr(0, entry.find(':')); };
    const auto entries = split(signature);
    for (size_t i = 0; i < count; ++i) {
      const auto entry = std::find_if(entries.begin(), entries.end(),
                                      [&](std::string_view e) { return name_of(e) == given[i]; });
      const bool scratch = given[i] == "scratch";
      if (entry == entries.end() || find(given[i]) || (scratch && scratch_)) {
        return fail("operand " + std::string(given[i]) + " is unknown or given twice");
      }
      if (scratch) {  // has none of the axes that the others share
        scratch_ = get(i);
        continue;
      }
      const Slot* slot = std::find_if(std::begin(kSlots), std::end(kSlots),
                                      [&](const Slot& s) { return s.name == given[i]; });
      bound_.push_back({slot, (*entry)[given[i].size() + 1], which[0] == 'o', get(i)});
    }
    for (std::string_view entry : entries) {
      if (entry.back() != '?' && !find(name_of(entry))) {
        fail("operand " + std::string(name_of(entry)) + " is missing");
      }
    }
  }

  const Bound* find(std::string_view name) const {
    for (const Bound& b : bound_) {
      if (b.slot->name == name) return &b;
    }
    return nullptr;
  }

  // The first that is there: an operand, its tangent or its cotangent.
  const Bound* find_any(const std::string& name) const {
    for (const char* prefix : {"", "d_", "ct_"}) {
      if (const Bound* bound = find(prefix + name)) return bound;
    }
    return nullptr;
  }

  int core_rank(Kind kind) const {
    const int grid = call_.displacement ? call_.dims : 1;
    switch (kind) {
      case Kind::kImage:
        return call_.dims + 1;
      case Kind::kPlane:
        return call_.dims;
      case Kind::kScalars:
        return grid;
      default:
        return grid + 1;
    }
  }

  // Products of sizes are formed freely below. An array with an empty axis may have others of any
  // size; no array in memory comes near the limit.
  static bool fits(Dims dims) {
    constexpr int64_t kMaxElements = int64_t(1) << 48;
    int64_t elements = 1;
    for (const int64_t n : dims) {
      if (n > kMaxElements / elements) return false;
      elements *= std::max<int64_t>(n, 1);
    }
    return true;
  }

  void read_shapes() {
    // Every signature has points, values and an image, the latter two maybe as tangent or
    // cotangent.
    const auto points = find("points")->buffer.dimensions();
    const Bound* image = find_any("image");
    if (points.size() < 2) return fail("points: expected at least 2 axes, got " + to_text(points));
    const int64_t dims = points[points.size() - 1];
    if (dims != 2 && dims != 3) {
      return fail("points: expected a last axis of 2 or 3, got " + to_text(points));
    }
    call_.dims = static_cast<int>(dims);
    if (boundaries_ != 1 && boundaries_ != static_cast<size_t>(dims)) {
      return fail("boundary: expected 1 or " + std::to_string(dims) + " words, got " +
                  std::to_string(boundaries_));
    }
    const Bound* values = find_any("values");
    call_.value_type = values->buffer.element_type();
    batch_rank_ = static_cast<int>(points.size()) - core_rank(Kind::kPoints);
    for (const Bound& b : bound_) {
      const auto got = b.buffer.dimensions();
      if (!fits(got)) return fail(std::string(b.slot->name) + ": too large, got " + to_text(got));
      if (static_cast<int>(got.size()) != batch_rank_ + core_rank(b.slot->kind) ||
          batch_rank_ < 0) {
        return fail(std::string(b.slot->name) + ": unexpected rank, got " + to_text(got) +
                    " with points " + to_text(points));
      }
    }

    Shape<int64_t>& shape = call_.shape;
    const bool first = call_.channels_first;
    const auto core = slice(image->buffer.dimensions(), batch_rank_, dims + 1);
    const auto spatial = slice(core, first ? 1 : 0, dims);
    const auto grid = slice(points, batch_rank_, core_rank(Kind::kScalars));
    shape.channels = core[first ? 0 : dims];
    int64_t plane = 1;
    for (int a = 0; a < 3; ++a) {  // axis a of a position is spatial axis dims - 1 - a of the array
      shape.size[a] = a < dims ? spatial[dims - 1 - a] : 1;
      shape.plane_stride[a] = plane;
      shape.stride[a] = plane * (first ? 1 : shape.channels);
      plane *= shape.size[a];
    }
    shape.points = 1;
    for (size_t i = 0; i < grid.size(); ++i) shape.points *= grid[i];
    shape.channel_stride = first ? plane : 1;
    shape.point_stride = first ? 1 : shape.channels;
    shape.point_channel_stride = first ? shape.points : 1;
    for (int a = 0; a < 3; ++a) {
      shape.grid[a] = call_.displacement && a < dims ? grid[dims - 1 - a] : 1;
    }

    for (const Bound& b : bound_) {
      check_core(b, spatial, grid);
      check_dtype(b);
    }
    for (int a = 0; a < dims; ++a) {
      if (shape.size[a] == 0 && call_.sampling.boundary[a] != Boundary::kConstant) {
        fail("image: an axis of size 0 needs boundary 'constant'");
      }
    }
  }

  void check_core(const Bound& b, Dims spatial, Dims grid) {
    std::vector<int64_t> expected;
    const bool on_image = b.slot->kind == Kind::kImage || b.slot->kind == Kind::kPlane;
    const Dims extent = on_image ? spatial : grid;
    expected.assign(extent.begin(), extent.end());
    if (b.slot->kind == Kind::kImage || b.slot->kind == Kind::kValues) {
      expected.insert(call_.channels_first ? expected.begin() : expected.end(),
                      call_.shape.channels);
    }
    if (b.slot->kind == Kind::kPoints) expected.push_back(call_.dims);
    const Dims got = slice(b.buffer.dimensions(), batch_rank_, core_rank(b.slot->kind));
    if (!std::equal(expected.begin(), expected.end(), got.begin(), got.end())) {
      fail(std::string(b.slot->name) + ": expected " +
           to_text(Dims(expected.data(), expected.size())) + " behind the batch axes, got " +
           to_text(got));
    }
  }

  void check_dtype(const Bound& b) {
    const ffi::DataType got = b.buffer.element_type();
    const bool wide = call_.value_type == ffi::F64;
    const bool half = got == ffi::F16 || got == ffi::BF16;
    bool good = false;
    switch (b.dtype) {
      case 'T':
        good = got == call_.value_type && (half || got == ffi::F32 || got == ffi::F64);
        // A sum over batch elements stays in the accumulator's dtype, see merge_batch_axes.
        good = good || (b.output && got == ffi::F32 && !wide);
        break;
      case 'A':
        good = got == (wide ? ffi::F64 : ffi::F32);
        break;
      case 'P':
        good = got == (wide ? ffi::F64 : ffi::F32) || (half && !wide && call_.displacement);
        break;
    }
    if (!good) fail(std::string(b.slot->name) + ": unexpected dtype");
  }

  // Batch axes broadcast: each is as long as the longest, or 1. Neighbours along which every
  // operand is contiguous become one axis.
  void merge_batch_axes() {
    std::vector<int64_t> full(batch_rank_, 1);
    for (const Bound& b : bound_) {
      const auto got = b.buffer.dimensions();
      for (int i = 0; i < batch_rank_; ++i) {
        if (got[i] != 1) full[i] = got[i];
      }
    }
    std::vector<std::vector<int64_t>> strides;
    for (const Bound& b : bound_) {
      const auto got = b.buffer.dimensions();
      int64_t stride = 1;
      for (size_t i = batch_rank_; i < got.size(); ++i) stride *= std::max<int64_t>(got[i], 1);
      strides.emplace_back(batch_rank_, 0);
      Operand& operand = call_.*b.slot->operand;
      for (int i = batch_rank_ - 1; i >= 0; --i) {
        if (got[i] != 1 && got[i] != full[i]) {
          return fail(std::string(b.slot->name) + ": batch axis " + std::to_string(i) +
                      " of size " + std::to_string(got[i]) + " does not broadcast to " +
                      std::to_string(full[i]));
        }
        if (got[i] != 1) strides.back()[i] = stride;
        if (b.output && got[i] != full[i]) operand.summed = true;
        stride *= got[i];
      }
    }
    Batch& batch = call_.batch;
    for (int i = 0; i < batch_rank_; ++i) {
      if (full[i] == 1) continue;
      bool joins = batch.rank > 0;
      for (size_t j = 0; joins && j < bound_.size(); ++j) {
        joins = (call_.*bound_[j].slot->operand).stride[batch.rank - 1] == strides[j][i] * full[i];
      }
      if (!joins && batch.rank == kMaxBatch) {
        return fail("more than " + std::to_string(kMaxBatch) + " batch axes that do not merge");
      }
      if (!joins) batch.size[batch.rank++] = 1;
      batch.size[batch.rank - 1] *= full[i];
      batch.count *= full[i];
      for (size_t j = 0; j < bound_.size(); ++j) {
        (call_.*bound_[j].slot->operand).stride[batch.rank - 1] = strides[j][i];
      }
    }
    for (const Bound& b : bound_) {
      Operand& operand = call_.*b.slot->operand;
      operand.data = b.buffer.untyped_data();
      operand.dtype = b.buffer.element_type();
      operand.output = b.output;
      operand.count = static_cast<int64_t>(b.buffer.element_count());
      if (b.output && b.dtype == 'T' && call_.value_type != ffi::F64 &&
          (operand.dtype == ffi::F32) != (operand.summed || call_.value_type == ffi::F32)) {
        fail(std::string(b.slot->name) + ": unexpected dtype");
      }
    }
  }

  void check_combination() {
    if (call_.values.summed || call_.d_values.summed) {
      fail("values: the result must have every batch axis");
    }
    const bool moves = find("d_image") && find("d_image")->output;
    if (const Bound* image = find(moves ? "d_image" : "image"); image && image->output) {
      // One task owns an image and its planes.
      for (const char* name : {"coverage", "weight", "peak", "d_coverage"}) {
        const Bound* plane = find(name);
        if (!plane || !plane->output) continue;
        const auto a = image->buffer.dimensions(), b = plane->buffer.dimensions();
        if (!std::equal(a.begin(), a.begin() + batch_rank_, b.begin())) {
          fail(std::string(name) + ": batch axes differ from those of the image");
        }
      }
    }
    const bool softmax = call_.reduce == Reduce::kSoftmax;
    const std::string_view name = signature_.name;
    const auto is = [&](const Signature& signature) { return name == signature.name; };
    if (find("d_importance") && !find("importance")) fail("d_importance needs importance");
    if (const Bound* peak = find("peak"); peak || softmax) {
      if (!peak || !find("importance")) return fail("a peak needs importance, and softmax both");
      if (softmax && is(kSplat) && !peak->output) fail("peak: softmax computes it");
      if (!softmax && (peak->output || is(kSplatVjp))) {
        fail("peak: only softmax has one here");
      }
      if (call_.sampling.method == Method::kCubic) fail("peak: method 'cubic' has none");
    }
    if (call_.reduce == Reduce::kSum) {
      if ((is(kGather) || is(kGatherTangent)) && !find("importance") != !find("peak")) {
        fail("a gather with importance needs its peak");
      }
      return;
    }
    if (!is(kSplat) && !is(kSplatTangent) && !is(kSplatVjp)) return fail("only a splat is reduced");
    if (call_.channels_first) fail("channels_first: only a sum takes it");
    if (call_.batch.count == 0 && (call_.image.summed || call_.d_image.summed)) {
      fail("image: only a sum may have no batch element");
    }
    if (call_.sampling.method == Method::kCubic) fail("method 'cubic': only a sum takes it");
    if (!find("image") || !find("coverage")) fail("an average needs image and coverage");
    if (!find("importance") != !find("weight"))
      fail("a weighted average needs importance and weight");
  }

  // A deterministic call forms its sums in the scratch: the uint32 words of each, see FixedPoint.
  void place_sums() {
    for (const Bound& b : bound_) {
      const bool on_image = b.slot->kind == Kind::kImage || b.slot->kind == Kind::kPlane;
      if (!b.output || !on_image || b.slot->name == "peak") continue;
      Operand& operand = call_.*b.slot->operand;
      operand.first_sum = call_.sums;
      call_.sums += operand.count;
    }
    const int64_t words = call_.sums * (call_.value_type == ffi::F64 ? 6 : 3);
    const bool fits = scratch_ && static_cast<int64_t>(scratch_->element_count()) >= words;
    if (scratch_ && scratch_->element_type() != ffi::U32) return fail("scratch: expected uint32");
    if (needs_scratch_ && call_.deterministic && words > 0 && !fits) {
      return fail("scratch: a deterministic call needs " + std::to_string(words) + " uint32, got " +
                  std::to_string(scratch_ ? scratch_->element_count() : 0));
    }
    if (scratch_) call_.scratch = scratch_->untyped_data();
  }

  const Signature& signature_;
  Call& call_;
  const bool needs_scratch_;
  int batch_rank_ = 0;
  size_t boundaries_ = 0;
  std::vector<Bound> bound_;
  std::optional<ffi::AnyBuffer> scratch_;
  std::string error_;
};

// Compile-time choices of one call.
template <Method M, int D, class T>
struct Types {
  static constexpr Method kMethod = M;
  static constexpr int kDims = D;
  using Value = T;
};

// Calls body(Types<...>) for the dtype of the call. A build for tests may leave out all but
// float32.
template <Method M, int D, class Body>
void dispatch_types(const Call& call, Body body) {
#if defined(JAXWARP_FLOAT32_ONLY)
  if (call.value_type == ffi::F32) body(Types<M, D, float>{});
#else
  switch (call.value_type) {
    case ffi::F16:
      return body(Types<M, D, float16>{});
    case ffi::BF16:
      return body(Types<M, D, bfloat16>{});
    case ffi::F64:
      return body(Types<M, D, double>{});
    default:
      return body(Types<M, D, float>{});
  }
#endif
}

// Calls body(integral_constant) for the importances of the call; only a splat takes some without a
// peak, and cubic weights have none. What has no elements has no address: the peak is asked first,
// which has pixels even where there are no points.
template <class Types, bool kSplat, class Body>
void dispatch_importances(const Call& call, Body body) {
  if constexpr (Types::kMethod != Method::kCubic) {
    if (call.peak.data != nullptr) {
      return body(std::integral_constant<Importances, Importances::kAny>{});
    }
  }
  if constexpr (kSplat) {
    if (call.importance.data != nullptr) {
      return body(std::integral_constant<Importances, Importances::kWeight>{});
    }
  }
  body(std::integral_constant<Importances, Importances::kOne>{});
}

// Calls body(integral_constant) for the reduction of the call; only a sum takes cubic weights.
template <class Types, class Body>
void dispatch_reduce(const Call& call, Body body) {
  if constexpr (Types::kMethod != Method::kCubic) {
    if (call.reduce == Reduce::kAverage) {
      return body(std::integral_constant<Reduce, Reduce::kAverage>{});
    }
    if (call.reduce == Reduce::kSoftmax) {
      return body(std::integral_constant<Reduce, Reduce::kSoftmax>{});
    }
  }
  body(std::integral_constant<Reduce, Reduce::kSum>{});
}

// Calls body(kernels) with Kernels<method, dims> of the call. Each of them is compiled in a file of
// its own, which the build writes: #define JAXWARP_METHOD and JAXWARP_DIMS, then #include the
// platform's source.
template <template <Method, int> class Kernels, class Body>
void dispatch_kernels(const Call& call, Body body) {
  const auto with_dims = [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    switch (call.sampling.method) {
      case Method::kNearest:
        return body(Kernels<Method::kNearest, D>{});
      case Method::kLinear:
        return body(Kernels<Method::kLinear, D>{});
      case Method::kCubic:
        return body(Kernels<Method::kCubic, D>{});
    }
  };
  if (call.dims == 2) {
    with_dims(Width<2>{});
  } else {
    with_dims(Width<3>{});
  }
}

}  // namespace jaxwarp
