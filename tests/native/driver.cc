// Calls the handlers as XLA does, with calls drawn at random or by libFuzzer: shapes, dtypes,
// attributes and positions, right ones and wrong ones. Every buffer ends where a heap block does,
// so that a sanitizer sees one element too many; some start at an element that is aligned to no
// more than itself. What must hold, and ends the process where it does not:
//   - a call succeeds or returns an error that names the handler; inputs stay as they were;
//   - results on the CPU have the same bits with every number of threads, and depend on nothing
//     that their memory held before (so every element is written);
//   - the CUDA kernels, compiled for the host or interpreted, agree with those of the CPU;
//   - with --expect FILE, results and conversions are those that another machine left there by
//     --write FILE: bit for bit, or, where exp is computed, as close as those of CUDA.
#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <thread>

#include "conversions.h"
#include "geometry.h"
#include "handlers.h"
#include "results.h"

// How many larger allocations of this thread succeed before one fails; negative: all do.
static thread_local int64_t allocations_left = -1;
__attribute__((noinline)) void* operator new(size_t size) {
  const bool fails = size >= 256 && allocations_left >= 0 && allocations_left-- == 0;
  void* const block = fails ? nullptr : std::malloc(std::max<size_t>(size, 1));
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
__attribute__((noinline)) void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(std::max<size_t>(size, 1));  // libFuzzer's, freed as the others are
}
__attribute__((noinline)) void operator delete(void* block) noexcept { std::free(block); }
__attribute__((noinline)) void operator delete(void* block, size_t) noexcept { std::free(block); }

// The part of XLA that handlers see.

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  // kLate: no thread comes before the handler has returned.
  enum class Kind { kThreads, kLate };
  using Task = XLA_FFI_ThreadPool_Schedule_Args;

  XLA_FFI_ExecutionContext(int threads, Kind kind) : threads(threads), kind(kind) {
    for (int i = 1; kind == Kind::kThreads && i < threads; ++i) {
      workers.emplace_back([this] { work(); });
    }
  }
  ~XLA_FFI_ExecutionContext() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closed = true;
    }
    arrived.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
  void schedule(const Task& task) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      tasks.push_back(task);
    }
    arrived.notify_one();
  }
  void run_late() {
    std::deque<Task> late;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (kind == Kind::kLate) late.swap(tasks);
    }
    for (const Task& task : late) task.task(task.data);
  }

  const int threads;

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      arrived.wait(lock, [this] { return closed || !tasks.empty(); });
      if (tasks.empty()) return;
      const Task task = tasks.front();
      tasks.pop_front();
      lock.unlock();
      task.task(task.data);
    }
  }

  const Kind kind;
  bool closed = false;
  std::mutex mutex;
  std::condition_variable arrived;
  std::deque<Task> tasks;
  std::vector<std::thread> workers;
};

namespace {

using jaxwarp::Signature;
using Pool = XLA_FFI_ExecutionContext;
using Extents = std::vector<int64_t>;

const XLA_FFI_Api* api() {
  static const XLA_FFI_Api instance = [] {
    XLA_FFI_Api api = {};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                       XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      return new XLA_FFI_Error{args->errc, args->message};
    };
    api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      const int64_t left = std::exchange(allocations_left, -1);  // those of handlers are counted
      args->ctx->schedule(*args);
      allocations_left = left;
      return nullptr;
    };
    api.XLA_FFI_ThreadPool_NumThreads =
        [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = args->ctx->threads;
      return nullptr;
    };
    api.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
      args->stream = nullptr;  // the default one
      return nullptr;
    };
    return api;
  }();
  return &instance;
}

struct Target {
  const char* name;
  const char* symbol;
  const Signature& signature;
  const char* no_memory;
};
const Target kTargets[] = {
#define JAXWARP_TARGET(target, Handler) \
  {#target, #Handler, jaxwarp::k##Handler, JAXWARP_NO_MEMORY(target)},
    JAXWARP_HANDLERS(JAXWARP_TARGET)
#undef JAXWARP_TARGET
};
constexpr int kTargetCount = sizeof(kTargets) / sizeof(*kTargets);

struct Options {
  std::vector<std::string> methods = {"nearest", "linear", "cubic"};
  std::vector<int> dims = {2, 3};
  std::vector<XLA_FFI_DataType> dtypes = {XLA_FFI_DataType_F32, XLA_FFI_DataType_F64,
                                          XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16};
  std::string cpu, cuda;  // the libraries; the second may be missing
  std::string write, expect;
  bool other_machine() const { return !(write + expect).empty(); }
  uint64_t seed = 1, first = 0, calls = UINT64_MAX;
  double seconds = 1e9;
  int threads = 1;
} options;

// Choices: one byte each while there are any, then pseudo-random numbers that depend on them.
class Source {
 public:
  Source(const uint8_t* data, size_t size, uint64_t seed) : next_(data), end_(data + size) {
    state_ = seed;
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;
  }
  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) {
    return next_ < end_ && n <= 256 ? *next_++ % n : static_cast<int64_t>(bits() % n);
  }
  bool once_in(int n) { return below(n) == n - 1; }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(choices.size())];
  }
  template <class C>
  auto& from(C& choices) {
    return choices[below(choices.size())];
  }

 private:
  const uint8_t *next_, *end_;
  uint64_t state_;
};

enum class Kind { kImage, kPlane, kPoints, kValues, kScalars, kScratch };

struct Buffer {
  std::string name;
  char letter;  // of its dtype in the signature
  bool output;
  XLA_FFI_DataType dtype;
  Extents dims;
  size_t shift = 0;  // elements

  std::string stem() const {
    for (const char* prefix : {"d_ct_", "ct_", "d_"}) {
      if (name.rfind(prefix, 0) == 0) return name.substr(strlen(prefix));
    }
    return name;
  }
  Kind kind() const {
    const std::string stem = this->stem();
    if (stem == "image") return Kind::kImage;
    if (stem == "points") return Kind::kPoints;
    if (stem == "values") return Kind::kValues;
    if (stem == "scratch") return Kind::kScratch;
    return stem == "importance" ? Kind::kScalars : Kind::kPlane;
  }
  bool sums() const {
    return output && (kind() == Kind::kImage || (kind() == Kind::kPlane && stem() != "peak"));
  }
  size_t count() const {
    size_t count = 1;
    for (int64_t n : dims) count *= n;
    return count;
  }
  size_t width() const { return xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(dtype)); }
  size_t bytes() const { return count() * width(); }
  size_t offset() const { return shift * width() % 16; }  // bytes from where 16 of them align
};

struct Attribute {
  std::string name;
  XLA_FFI_AttrType type;
  XLA_FFI_DataType dtype = XLA_FFI_DataType_PRED;
  std::string text = "";
  double number = 0;
  bool flag = false;
  Extents list = {};
};

struct Case {
  int target = 0;
  bool right = true;   // as the Python side would make it
  bool tame = true;    // finite values of moderate size, no weight of a position nearly 0
  bool rough = false;  // numbers of many digits: every product and sum is rounded
  bool displacement = false;
  bool deterministic = false;
  bool differentiated = false;  // the weights are
  int dims = 2;
  Extents spatial, grid;  // in the order of an array's axes
  Extents derivative;     // of the weights, along each axis
  std::vector<Buffer> buffers;
  std::vector<Attribute> attributes;
  std::string method, reduce;

  const Buffer* find(const std::string& name, bool output) const {
    for (const Buffer& b : buffers) {
      if (b.name == name && b.output == output) return &b;
    }
    return nullptr;
  }
  // Importances are logits, of which exp is computed. Of all that is computed, only exp is not
  // rounded as IEEE 754 says.
  bool logits() const { return reduce == "softmax" || find("peak", false) || find("peak", true); }
  // Do results that differ by rounding stay close? Slopes have both signs: divided by what is left
  // of their sum, rounding has no bound.
  bool steady() const { return tame && !(differentiated && reduce != "sum"); }
  std::string text() const {
    std::string all = kTargets[target].name;
    for (const Buffer& b : buffers) {
      all += std::string(b.output ? " -> " : " ") + b.name + ":" + std::to_string(b.dtype) +
             jaxwarp::to_text({b.dims.data(), b.dims.size()});
      if (b.offset() > 0) all += "+" + std::to_string(b.offset());
    }
    for (const Attribute& a : attributes) {
      all += " " + a.name + "=";
      if (a.type == XLA_FFI_AttrType_STRING) all += "'" + a.text + "'";
      if (a.type == XLA_FFI_AttrType_ARRAY) all += jaxwarp::to_text({a.list.data(), a.list.size()});
      if (a.type == XLA_FFI_AttrType_SCALAR) all += std::to_string(a.flag + a.number);
    }
    return all;
  }
};

// `--seed S --first N --calls N+1` repeats case N of `--seed S`.
thread_local uint64_t case_number = 0;

[[noreturn]] void fail(const Case& c, const std::string& what) {
  std::fprintf(stderr, "driver: case %llu: %s\n%s\n", static_cast<unsigned long long>(case_number),
               what.c_str(), c.text().c_str());
  std::abort();
}

// ---------------------------------------------------------------------------- drawing a call

int64_t draw_size(Source& s) {
  if (s.once_in(40)) return 0;
  return s.once_in(12) ? 1 + s.below(40) : 1 + s.below(6);
}

// Operands by name, each with the letter of its dtype, as a signature lists them.
using Operands = std::map<std::string, char>;
Operands draw_operands(Source& s, const char* signature) {
  Operands drawn;
  for (const std::string_view entry : jaxwarp::split(signature)) {
    const size_t colon = entry.find(':');
    if (entry.back() == '?' && s.below(2)) continue;
    drawn[std::string(entry.substr(0, colon))] = entry[colon + 1];
  }
  return drawn;
}

void draw_operands(Source& s, Case& c) {
  const std::string target = kTargets[c.target].name;
  const bool splats = target.find("splat") != target.npos, divides = c.reduce != "sum";
  Operands inputs = draw_operands(s, kTargets[c.target].signature.inputs);
  Operands outputs = draw_operands(s, kTargets[c.target].signature.outputs);
  // What goes together, see Decoder::check_combination.
  const auto has = [&](const char* name) { return inputs.count(name) > 0; };
  const auto set = [](Operands& operands, const char* name, bool there) {
    operands.erase(name);
    if (there) operands[name] = 'A';
  };
  outputs.erase("peak");
  outputs.erase("scratch");
  const bool cubic = c.method == "cubic";
  if (divides || cubic || target == "jaxwarp_splat_vjp") inputs.erase("peak");
  if (cubic && !splats) {
    for (const char* name : {"importance", "d_importance"}) inputs.erase(name);
  }
  const bool importance =
      has("importance") || has("d_importance") || has("peak") || c.reduce == "softmax";
  set(inputs, "importance", importance);
  if (!splats) set(inputs, "peak", importance);
  if (divides) {
    Operands& residuals = target == "jaxwarp_splat" ? outputs : inputs;
    set(residuals, "image", true);
    set(residuals, "coverage", true);
    set(residuals, "weight", importance);
    set(residuals, "peak", c.reduce == "softmax");
  }

  const XLA_FFI_DataType value = s.from(options.dtypes);
  const bool wide = value == XLA_FFI_DataType_F64;
  const XLA_FFI_DataType sum = wide ? value : XLA_FFI_DataType_F32;
  for (const auto* list : {&inputs, &outputs}) {
    for (const auto& [name, letter] : *list) {
      XLA_FFI_DataType dtype = letter == 'T' ? value : sum;
      if (letter == 'P' && c.displacement && !wide && s.once_in(4)) {
        dtype = s.of({XLA_FFI_DataType_F16, XLA_FFI_DataType_BF16});
      }
      c.buffers.push_back({name, letter, list == &outputs, dtype, {}});
    }
  }
  const auto sums = [](const Buffer& b) { return b.sums(); };
  if (c.deterministic && std::any_of(c.buffers.begin(), c.buffers.end(), sums)) {
    c.buffers.push_back({"scratch", 'U', true, XLA_FFI_DataType_U32, {}});
  }
}

void draw_shapes(Source& s, Case& c, bool channels_first) {
  const bool large = s.once_in(48);  // work for several threads
  c.spatial.resize(c.dims);
  for (int64_t& n : c.spatial) n = large ? 3 + s.below(6) : draw_size(s);
  if (large) c.spatial[0] = 33 + s.below(64);
  if (large && c.dims == 2) c.spatial[1] = 33 + s.below(64);
  c.grid.resize(c.displacement ? c.dims : 1);
  for (int64_t& n : c.grid) n = draw_size(s);
  if (large) c.grid.back() = c.displacement && c.dims == 3 ? 700 : c.displacement ? 900 : 4000;
  int64_t channels = s.of<int64_t>({1, 1, 2, 3, 3, 4, 4, 5, 7, 8, 9, 11, 12, 16, 17, 36, 0});
  if (large) channels = s.of<int64_t>({3, 4, 7, 8, 12});

  // An image without channels has no elements, however large it is.
  bool planes = false;
  for (const Buffer& b : c.buffers) planes = planes || b.kind() == Kind::kPlane;
  if (channels == 0 && !planes && s.once_in(4)) {
    for (int64_t& n : c.spatial) n = int64_t(1) << s.below(64 / c.dims);
    c.right = false;  // maybe too large
  }

  Extents batch(s.of({0, 0, 0, 1, 1, 2, 3, s.once_in(16) ? 8 : 1}));
  const int64_t most = batch.size() <= 3 ? 3 : large ? 1 : 2;  // a case takes seconds at most
  for (int64_t& n : batch) n = s.once_in(24) ? 0 : 1 + s.below(most);
  const bool shared = s.below(2);
  Extents image_batch = batch;
  for (int64_t& n : image_batch) n = shared && s.below(2) ? 1 : n;
  const bool no_element = std::count(batch.begin(), batch.end(), 0) > 0;
  if (no_element && image_batch != batch && c.reduce != "sum") c.right = false;
  size_t words = 0;
  for (Buffer& b : c.buffers) {
    if (b.kind() == Kind::kScratch) {  // the last one
      b.dims = {static_cast<int64_t>(words)};
      continue;
    }
    const bool own = b.output && (b.name == "values" || b.name == "d_values");
    if (b.output && (b.kind() == Kind::kImage || b.kind() == Kind::kPlane)) {
      b.dims = image_batch;  // an image and its planes are summed over the same axes
    } else {
      for (int64_t n : batch) b.dims.push_back(!own && shared && s.below(2) ? 1 : n);
    }
    const Kind kind = b.kind();
    const bool has_channels = kind == Kind::kImage || kind == Kind::kValues;
    const Extents& extent = kind == Kind::kImage || kind == Kind::kPlane ? c.spatial : c.grid;
    if (has_channels && channels_first) b.dims.push_back(channels);
    b.dims.insert(b.dims.end(), extent.begin(), extent.end());
    if (has_channels && !channels_first) b.dims.push_back(channels);
    if (kind == Kind::kPoints) b.dims.push_back(c.dims);
    if (b.sums()) words += b.count() * (b.dtype == XLA_FFI_DataType_F64 ? 6 : 3);
  }
  // Of a point's results, those without a batch axis that others have are sums.
  for (Buffer& b : c.buffers) {
    bool sum = false;
    for (size_t i = 0; i < batch.size() && b.output && b.letter == 'T'; ++i) {
      for (const Buffer& other : c.buffers) {
        const bool scratch = other.kind() == Kind::kScratch;
        sum = sum || (!scratch && b.dims[i] == 1 && other.dims[i] != 1);
      }
    }
    if (sum && b.dtype != XLA_FFI_DataType_F64) b.dtype = XLA_FFI_DataType_F32;
  }
}

void draw_attributes(Source& s, Case& c, bool channels_first) {
  const auto joined = [&](bool output) {
    std::string names;
    for (const Buffer& b : c.buffers) {
      if (b.output == output) names += (names.empty() ? "" : " ") + b.name;
    }
    return names;
  };
  const auto text = [&](const char* name, std::string value) {
    c.attributes.push_back({name, XLA_FFI_AttrType_STRING});
    c.attributes.back().text = std::move(value);
  };
  const auto number = [&](const char* name, double value) {
    c.attributes.push_back({name, XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_F64});
    c.attributes.back().number = value;
  };
  const auto flag = [&](const char* name, bool value) {
    c.attributes.push_back({name, XLA_FFI_AttrType_SCALAR, XLA_FFI_DataType_PRED});
    c.attributes.back().flag = value;
  };
  std::string boundaries;  // along x, y[, z]
  const bool mixed = s.once_in(3);
  const std::string common = s.of({"constant", "nearest", "mirror", "reflect", "wrap"});
  for (int a = 0; a < c.dims; ++a) {
    const bool empty = c.spatial[c.dims - 1 - a] == 0;
    const std::string own = s.of({"constant", "nearest", "mirror", "reflect", "wrap"});
    boundaries += (a ? " " : "") + (empty ? "constant" : mixed ? own : common);
  }
  const double wild = s.of<double>({NAN, INFINITY, -INFINITY, 1e300, -1e-300, 0.0});
  // In the order of their names, as XLA passes them.
  text("boundary", boundaries);
  flag("channels_first", channels_first);
  number("cubic_a", c.tame ? s.of({-0.5, -0.75}) : wild);
  c.attributes.push_back({"derivative", XLA_FFI_AttrType_ARRAY, XLA_FFI_DataType_S64});
  Extents& order = c.derivative;
  order.resize(c.dims, 0);
  if (s.once_in(3)) order[s.below(c.dims)] = s.of({1, 1, 2, 3, 4, 1000});
  if (s.once_in(12)) order[s.below(c.dims)] = 1;
  for (const int64_t k : order) c.differentiated = c.differentiated || k > 0;
  c.attributes.back().list = order;
  flag("deterministic", c.deterministic);
  flag("displacement", c.displacement);
  number("fill_value", c.tame ? s.of({0.0, 1.5}) : wild);
  text("inputs", joined(false));
  text("method", c.method);
  number("min_coverage", c.tame ? s.of({0.0, 0.1, 0.7}) : wild);
  text("outputs", joined(true));
  text("reduce", c.reduce);
}

// Where some operands start. Scratch has no meaning to anyone but XLA, which allocates it.
void draw_places(Source& s, Case& c) {
  if (!s.once_in(4)) return;
  for (Buffer& b : c.buffers) {
    if (b.kind() != Kind::kScratch && s.below(2)) b.shift = 1 + s.below(7);
  }
}

// One thing about the call is wrong, or at least unusual.
void spoil(Source& s, Case& c) {
  c.right = false;
  Buffer& b = s.from(c.buffers);
  Attribute& a = s.from(c.attributes);
  switch (s.below(10)) {
    case 0:
      if (!b.dims.empty()) s.from(b.dims) = s.of<int64_t>({0, 1, 2, 3, 5, 100});
      break;
    case 1:
      if (!b.dims.empty()) s.from(b.dims) += s.of<int64_t>({-1, 1});
      for (int64_t& n : b.dims) n = std::max<int64_t>(n, 0);
      break;
    case 2:
      if (!b.dims.empty()) b.dims.erase(b.dims.begin() + s.below(b.dims.size()));
      break;
    case 3: {
      const int64_t place = s.below(b.dims.size() + 1);  // drawn first by every compiler
      b.dims.insert(b.dims.begin() + place, s.of<int64_t>({0, 1, 2}));
      break;
    }
    case 4:
      b.dtype = s.of({s.from(options.dtypes), XLA_FFI_DataType_S32, XLA_FFI_DataType_U8,
                      XLA_FFI_DataType_PRED, XLA_FFI_DataType_C64, XLA_FFI_DataType_F8E4M3FN});
      break;
    case 5:
      c.attributes.erase(c.attributes.begin() + s.below(c.attributes.size()));
      break;
    case 6:
      a.type = s.of({XLA_FFI_AttrType_STRING, XLA_FFI_AttrType_SCALAR, XLA_FFI_AttrType_ARRAY});
      a.dtype = s.of({XLA_FFI_DataType_PRED, XLA_FFI_DataType_F64, XLA_FFI_DataType_F32,
                      XLA_FFI_DataType_S64, XLA_FFI_DataType_S32});
      break;
    case 7:
      a.text = s.of({"", " ", "points", "points points", "image  points", "linear linear", "?"});
      a.list = s.of<Extents>({{}, {-1, 0}, {0, 0, 0, 0}, {1001, 0}, {INT64_MAX}, {0, INT64_MIN}});
      break;
    case 8:  // the names and the buffers
      c.buffers.erase(c.buffers.begin() + s.below(c.buffers.size()));
      break;
    case 9:
      b.dims = {int64_t(1) << s.below(63), 0, int64_t(1) << s.below(63), 2};
      break;
  }
}

Case draw_case(Source& s) {
  Case c;
  c.target = static_cast<int>(s.below(kTargetCount));
  c.tame = !s.once_in(8);
  c.dims = s.from(options.dims);
  c.displacement = s.below(2);
  c.deterministic = s.once_in(4);
  c.method = s.from(options.methods);
  const bool splats = std::string(kTargets[c.target].name).find("splat") != std::string::npos;
  c.reduce = splats && c.method != "cubic" ? s.of({"sum", "average", "softmax"}) : "sum";
  const bool channels_first = c.reduce == "sum" && s.once_in(4);
  draw_operands(s, c);
  c.rough = options.other_machine() && !c.logits();  // there the bits must be the same
  draw_shapes(s, c, channels_first);
  draw_attributes(s, c, channels_first);
  draw_places(s, c);
  if (s.once_in(6)) spoil(s, c);
  return c;
}

// ---------------------------------------------------------------------------- numbers

double draw_position(Source& s, const Case& c, int64_t n) {
  const double size = static_cast<double>(n);
  if (s.once_in(24)) {
    const double special = s.of<double>({NAN, INFINITY, -INFINITY, 1e30, -1e30});
    const double large =
        s.of<double>({2147483648.0, -8589934592.0, 1e9, -1e9, 1e18, -1e18, 536870912.0});
    // What rounding leaves of pixel + flow depends on how the sum is formed.
    return c.displacement && c.tame ? special : s.of({special, large});
  }
  if (!c.tame && s.once_in(8)) {  // almost a pixel
    const double pixel = static_cast<double>(s.below(n + 2) - 1);
    return s.of<double>({pixel * (1 + 1e-7), pixel * (1 - 1e-7), pixel + 1e-40, pixel - 1e-30});
  }
  switch (s.below(4)) {
    case 0:
      return static_cast<double>(s.below(n + 6) - 3);
    case 1:
      return s.of<double>({-1, -0.5, -0.0, 0, size - 1, size - 0.5, size, size - 2, 0.5});
    default:
      const int64_t steps = c.rough ? 61 : 64;  // in a pixel
      const int64_t step = s.below((std::min<int64_t>(n, 4096) + 6) * steps);
      return static_cast<double>(step) / static_cast<double>(steps) - 3;
  }
}

double draw_number(Source& s, const Case& c, const Buffer& b) {
  const bool plain = b.name == b.stem();
  const bool logit = c.logits();
  if (plain && b.kind() == Kind::kScalars && logit && s.once_in(16)) return -INFINITY;
  const int64_t steps = static_cast<int64_t>(s.bits() % 33) - 16;
  const double number = static_cast<double>(steps) / (c.rough ? 7 : 8);
  const bool weight = plain && (b.name == "coverage" || b.name == "weight" ||
                                (b.kind() == Kind::kScalars && !logit));
  return weight ? std::max(number, 0.0) : number;
}

void put(uint8_t* to, XLA_FFI_DataType dtype, double value) {
  const float single = static_cast<float>(value);
  if (dtype == XLA_FFI_DataType_F64) memcpy(to, &value, 8);
  if (dtype == XLA_FFI_DataType_F32) memcpy(to, &single, 4);
  if (dtype == XLA_FFI_DataType_F16) {
    const auto half = jaxwarp::narrow<jaxwarp::float16>(single);
    memcpy(to, &half, 2);
  }
  if (dtype == XLA_FFI_DataType_BF16) {
    const auto half = jaxwarp::narrow<jaxwarp::bfloat16>(single);
    memcpy(to, &half, 2);
  }
}

double get(const uint8_t* from, XLA_FFI_DataType dtype) {
  const auto read = [from](auto value) {
    memcpy(&value, from, sizeof(value));
    return static_cast<double>(jaxwarp::widen(value));
  };
  if (dtype == XLA_FFI_DataType_F64) return read(double{});
  if (dtype == XLA_FFI_DataType_F16) return read(jaxwarp::float16{});
  if (dtype == XLA_FFI_DataType_BF16) return read(jaxwarp::bfloat16{});
  if (dtype == XLA_FFI_DataType_F32) return read(float{});
  return *from;  // of a dtype that only faulty.cc and faulty.cu take, maybe of one byte
}

// The bytes of a heap block from `offset` on, of which malloc aligns the first as XLA does at
// least; an empty one may be null.
struct Block {
  uint8_t* block = nullptr;
  uint8_t* data = nullptr;
  size_t bytes = 0;
  Block(size_t bytes, bool null, size_t offset = 0) : bytes(bytes) {
    if (bytes == 0 && null) return;
    block = static_cast<uint8_t*>(std::malloc(offset + bytes));
    data = block + offset;
  }
  Block(Block&& other) noexcept
      : block(std::exchange(other.block, nullptr)), data(other.data), bytes(other.bytes) {}
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(block); }
};
using Blocks = std::vector<Block>;

void fill(Source& s, const Case& c, const Buffer& b, uint8_t* data) {
  const size_t count = b.count(), width = b.width();
  const int64_t dims = c.dims;
  for (size_t i = 0; i < count; ++i) {
    if (b.name == "points") {
      const int axis = static_cast<int>(i % dims);
      double p = draw_position(s, c, c.spatial[dims - 1 - axis]);
      int64_t pixel = i / dims;
      if (c.displacement) {
        for (int a = 0; a < axis; ++a) pixel /= std::max<int64_t>(c.grid[dims - 1 - a], 1);
        p -= static_cast<double>(pixel % std::max<int64_t>(c.grid[dims - 1 - axis], 1));
      }
      put(data + i * width, b.dtype, p);
    } else if (!c.tame && s.once_in(4)) {
      const uint64_t bits = s.bits();
      memcpy(data + i * width, &bits, std::min<size_t>(width, 8));
    } else {
      memset(data + i * width, 0, width);
      put(data + i * width, b.dtype, draw_number(s, c, b));
    }
  }
}

// ---------------------------------------------------------------------------- a call

struct Outcome {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message;
};

// `allocations`: so many larger allocations of the handler succeed; negative: all.
Outcome call(XLA_FFI_Handler* handler, const Case& c, Pool& pool, const Blocks& inputs,
             Blocks& outputs, int64_t allocations = -1) {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<Extents> dims;
  for (const Buffer& b : c.buffers) dims.push_back(b.dims);  // of exact size as well
  size_t in = 0, out = 0;
  for (size_t i = 0; i < c.buffers.size(); ++i) {
    const Buffer& b = c.buffers[i];
    void* const data = b.output ? outputs[out++].data : inputs[in++].data;
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, b.dtype, data,
                       static_cast<int64_t>(b.dims.size()), dims[i].data()});
  }
  std::vector<void*> args, rets, attrs;
  for (size_t i = 0; i < buffers.size(); ++i) {
    (c.buffers[i].output ? rets : args).push_back(&buffers[i]);
  }
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);

  const size_t count = c.attributes.size();
  std::vector<XLA_FFI_ByteSpan> names(count), strings(count);
  std::vector<XLA_FFI_ByteSpan*> name_places;
  std::vector<XLA_FFI_AttrType> attr_types;
  std::vector<XLA_FFI_Scalar> scalars(count);
  std::vector<XLA_FFI_Array> arrays(count);
  for (size_t i = 0; i < count; ++i) {
    const Attribute& a = c.attributes[i];
    names[i] = {a.name.data(), a.name.size()};
    strings[i] = {a.text.data(), a.text.size()};
    const void* const value = a.dtype == XLA_FFI_DataType_PRED
                                  ? static_cast<const void*>(&a.flag)
                                  : static_cast<const void*>(&a.number);
    scalars[i] = {a.dtype, const_cast<void*>(value)};
    arrays[i] = {a.dtype, a.list.size(), const_cast<int64_t*>(a.list.data())};
    name_places.push_back(&names[i]);
    attr_types.push_back(a.type);
    attrs.push_back(a.type == XLA_FFI_AttrType_STRING  ? static_cast<void*>(&strings[i])
                    : a.type == XLA_FFI_AttrType_ARRAY ? static_cast<void*>(&arrays[i])
                                                       : static_cast<void*>(&scalars[i]));
  }

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = api();
  frame.ctx = &pool;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()),
                arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()),
                ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,   nullptr,
                 static_cast<int64_t>(count), attr_types.data(),
                 name_places.data(),          attrs.data()};
  allocations_left = allocations;
  XLA_FFI_Error* const error = jaxwarp::guarded(handler, &frame, kTargets[c.target].no_memory);
  allocations_left = -1;
  pool.run_late();
  if (error == nullptr) return {};
  Outcome outcome = {error->code, error->message};
  delete error;
  return outcome;
}

Blocks poisoned(const Case& c, int byte, bool null) {
  Blocks blocks;
  for (const Buffer& b : c.buffers) {
    if (!b.output) continue;
    blocks.emplace_back(b.bytes(), null, b.offset());
    if (blocks.back().data != nullptr) memset(blocks.back().data, byte, b.bytes());
  }
  return blocks;
}

// ---------------------------------------------------------------------------- what must hold

// NaN equals NaN, whatever its bits.
bool same(const Buffer& b, const Block& x, const Block& y) {
  if (x.bytes == 0 || memcmp(x.data, y.data, x.bytes) == 0) return true;
  const size_t width = b.width();
  for (size_t i = 0; i < x.bytes; i += width) {
    if (memcmp(x.data + i, y.data + i, width) == 0) continue;
    const double v = get(x.data + i, b.dtype), w = get(y.data + i, b.dtype);
    if (std::isnan(v) && std::isnan(w)) continue;
    std::fprintf(stderr, "driver: %s[%zu]: %.17g, %.17g\n", b.name.c_str(), i / width, v, w);
    return false;
  }
  return true;
}

// Sums are taken in the same order; dot products over channels are not.
double tolerance(const Buffer& b) {
  switch (b.dtype) {
    case XLA_FFI_DataType_F64:
      return 1e-11;
    case XLA_FFI_DataType_BF16:
      return 1.0 / 128;
    case XLA_FFI_DataType_F16:
      return 1.0 / 512;
    default:
      return 2e-5;
  }
}

// The largest weight of a corner. A cubic one reaches 1 along an axis, and differentiated once,
// twice (2 (a + 3)) and three times (6 (a + 2)) what stands here; a tangent and a cotangent of the
// points differentiate once more each.
double largest_weight(const Case& c) {
  if (c.method != "cubic") return 1;
  constexpr double kLargest[] = {1, 1.4, 5, 9, 0};
  double largest = 1;
  for (int i = 0; i < c.dims; ++i) {
    for (int j = 0; j < c.dims; ++j) {
      double product = 1;
      for (int k = 0; k < c.dims; ++k) {
        product *= kLargest[std::min<int64_t>(c.derivative[k] + (k == i) + (k == j), 4)];
      }
      largest = std::max(largest, product);
    }
  }
  return largest;
}

// `scale`: how large the numbers are at least that are added up, and may cancel.
bool close(const Buffer& b, const Block& x, const Block& y, double scale) {
  const size_t width = b.width();
  for (size_t i = 0; i < x.bytes; i += width) {
    const double v = std::abs(get(x.data + i, b.dtype));
    if (std::isfinite(v)) scale = std::max(scale, v);
  }
  for (size_t i = 0; i < x.bytes; i += width) {
    const double v = get(x.data + i, b.dtype), w = get(y.data + i, b.dtype);
    if (v == w || (std::isnan(v) && std::isnan(w))) continue;
    if (!(std::abs(v - w) <= tolerance(b) * scale)) {
      std::fprintf(stderr, "driver: %s[%zu]: %.17g, %.17g\n", b.name.c_str(), i / width, v, w);
      return false;
    }
  }
  return true;
}

struct Handlers {
  XLA_FFI_Handler* handler[kTargetCount];
  explicit Handlers(const std::string& path) {
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      std::fprintf(stderr, "driver: %s\n", dlerror());
      std::exit(2);
    }
    for (int i = 0; i < kTargetCount; ++i) {
      handler[i] = reinterpret_cast<XLA_FFI_Handler*>(dlsym(library, kTargets[i].symbol));
    }
  }
};

struct Count {
  std::atomic<uint64_t> cases{0}, calls{0}, errors{0}, compared{0}, no_memory{0};
  std::atomic<uint64_t> equal{0}, near{0}, unsteady{0};  // beside another machine's
};

class Trial {
 public:
  Trial() : cpu_(options.cpu) {
    if (!options.cuda.empty()) cuda_.emplace(options.cuda);
    if (options.other_machine()) {
      const bool writes = !options.write.empty();
      results_.emplace(writes ? options.write : options.expect, writes);
      check_conversions<jaxwarp::float16>(*results_);
      check_conversions<jaxwarp::bfloat16>(*results_);
    }
    for (int threads : {1, 2, 3, 8}) pools_.emplace_back(threads, Pool::Kind::kThreads);
    pools_.emplace_back(4, Pool::Kind::kLate);
  }

  void run(Source s) {
    const Case c = draw_case(s);
    XLA_FFI_Handler* const handler = cpu_.handler[c.target];
    if (handler == nullptr) return;
    size_t bytes = 0;
    for (const Buffer& b : c.buffers) {
      const int64_t last = b.dims.empty() ? 0 : b.dims.back();
      const bool built = std::count(options.dims.begin(), options.dims.end(), last) > 0;
      if (b.name == "points" && (last == 2 || last == 3) && !built) return;
      // So that sizes are right that no memory has: only empty arrays are that large.
      const bool empty = std::count(b.dims.begin(), b.dims.end(), 0) > 0;
      for (size_t i = 0, n = 1; i < b.dims.size() && !empty; n *= b.dims[i++]) {
        if (n * static_cast<size_t>(b.dims[i]) > 1 << 22) return;
      }
      bytes += empty ? 0 : b.bytes();
    }
    if (bytes > 1 << 25) return;
    ++count.cases;

    const bool null = s.below(2);
    Blocks inputs, copies;
    for (const Buffer& b : c.buffers) {
      if (b.output) continue;
      inputs.emplace_back(b.bytes(), null, b.offset());
      if (b.bytes() > 0) fill(s, c, b, inputs.back().data);
      copies.emplace_back(b.bytes(), false);
      if (b.bytes() > 0) memcpy(copies.back().data, inputs.back().data, b.bytes());
    }
    if (s.once_in(16)) {
      Blocks outputs = poisoned(c, 0xff, null);
      const int64_t allocations = s.below(4);
      const Outcome outcome = call(handler, c, s.from(pools_), inputs, outputs, allocations);
      ++count.calls;
      if (outcome.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED) ++count.no_memory;
      check_error(c, outcome);
    }
    Blocks first = poisoned(c, 0xff, null), second = poisoned(c, 0x5a, null);
    const Outcome outcome = call(handler, c, pools_[0], inputs, first);
    const Outcome again = call(handler, c, s.from(pools_), inputs, second);
    count.calls += 2;
    check_error(c, outcome);
    if (outcome.message != again.message) fail(c, "another message the second time");
    if (c.right && outcome.code != XLA_FFI_Error_Code_OK &&
        c.find("points", false)->dims.size() < 7) {
      fail(c, "refused: " + outcome.message);
    }
    if (outcome.code == XLA_FFI_Error_Code_OK) {
      compare(c, first, second, "another thread count, other memory", same);
    } else {
      ++count.errors;
    }
    if (cuda_ && cuda_->handler[c.target]) on_cuda(c, outcome, inputs, first, null);
    if (results_) on_another_machine(c, outcome, first);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].bytes > 0 && memcmp(inputs[i].data, copies[i].data, inputs[i].bytes) != 0) {
        fail(c, "an input was written to");
      }
    }
  }

  void finish() {
    if (results_) results_->finish();
  }

  Count count;

 private:
  void on_cuda(const Case& c, const Outcome& expected, const Blocks& inputs, const Blocks& cpu,
               bool null) {
    Blocks first = poisoned(c, 0xff, null), second = poisoned(c, 0x5a, null);
    const Outcome outcome = call(cuda_->handler[c.target], c, pools_[0], inputs, first);
    const Outcome again = call(cuda_->handler[c.target], c, pools_[0], inputs, second);
    count.calls += 2;
    if (again.message != outcome.message) {
      fail(c, "CUDA: another message the second time: " + outcome.message + " | " + again.message);
    }
    // The CPU does without.
    if (!c.right && outcome.message.find(": scratch: a deterministic") != std::string::npos) return;
    if (outcome.message != expected.message) fail(c, "CUDA: another message: " + outcome.message);
    if (outcome.code != XLA_FFI_Error_Code_OK) return;
    compare(c, first, second, "CUDA: other memory", same);
    if (!c.steady()) return;
    const double scale = largest_weight(c);
    compare(
        c, cpu, first, "CPU and CUDA",
        [scale](const Buffer& b, const Block& x, const Block& y) { return close(b, x, y, scale); });
    ++count.compared;
  }

  void on_another_machine(const Case& c, const Outcome& outcome, const Blocks& here) {
    if (results_->exchange(c.text()) != c.text()) fail(c, "another machine: another call");
    const std::string message = results_->exchange(outcome.message);
    if (message != outcome.message) fail(c, "another machine: another message: " + message);
    if (outcome.code != XLA_FFI_Error_Code_OK) return;
    Blocks there;
    for (const Block& block : here) {
      there.emplace_back(block.bytes, false);
      if (block.bytes == 0) continue;
      memcpy(there.back().data, block.data, block.bytes);
      results_->exchange(there.back().data, block.bytes);
    }
    const double scale = largest_weight(c);
    compare(c, there, here, "another machine",
            [&](const Buffer& b, const Block& x, const Block& y) {
              const bool no_exp = !c.logits() || b.stem() == "coverage" || b.stem() == "peak";
              return no_exp ? same(b, x, y) : !c.steady() || close(b, x, y, scale);
            });
    ++(!c.logits() ? count.equal : c.steady() ? count.near : count.unsteady);
  }

  template <class Equal>
  void compare(const Case& c, const Blocks& x, const Blocks& y, const char* what, Equal equal) {
    size_t out = 0;
    for (const Buffer& b : c.buffers) {
      if (!b.output) continue;
      const bool scratch = b.kind() == Kind::kScratch;  // which may hold anything
      if (!scratch && !equal(b, x[out], y[out])) fail(c, b.name + " differs: " + what);
      ++out;
    }
  }

  void check_error(const Case& c, const Outcome& outcome) {
    const std::string name = std::string(kTargets[c.target].name) + ": ";
    if (outcome.code == XLA_FFI_Error_Code_OK || outcome.message.rfind(name, 0) == 0) return;
    fail(c, "an error that does not name the handler: " + outcome.message);
  }

  Handlers cpu_;
  std::optional<Handlers> cuda_;
  std::optional<Results> results_;
  std::deque<Pool> pools_;
};

std::vector<std::string> words(std::string text) {
  std::replace(text.begin(), text.end(), ',', ' ');
  std::vector<std::string> all;
  for (std::string_view word : jaxwarp::split(text)) all.emplace_back(word);
  return all;
}

void set_option(const std::string& name, const std::string& value) {
  static const std::map<std::string, XLA_FFI_DataType> kDtypes = {
      {"float16", XLA_FFI_DataType_F16},
      {"bfloat16", XLA_FFI_DataType_BF16},
      {"float32", XLA_FFI_DataType_F32},
      {"float64", XLA_FFI_DataType_F64}};
  if (name == "cpu") {
    options.cpu = value;
  } else if (name == "cuda") {
    options.cuda = value;
  } else if (name == "write") {
    options.write = value;
  } else if (name == "expect") {
    options.expect = value;
  } else if (name == "methods") {
    options.methods = words(value);
  } else if (name == "seed") {
    options.seed = std::stoull(value);
  } else if (name == "first") {
    options.first = std::stoull(value);
  } else if (name == "calls") {
    options.calls = std::stoull(value);
  } else if (name == "seconds") {
    options.seconds = std::stod(value);
  } else if (name == "threads") {
    options.threads = std::stoi(value);
  } else if (name == "dims") {
    options.dims.clear();
    for (const std::string& word : words(value)) options.dims.push_back(std::stoi(word));
  } else if (name == "dtypes") {
    options.dtypes.clear();
    for (const std::string& word : words(value)) options.dtypes.push_back(kDtypes.at(word));
  } else {
    std::fprintf(stderr, "driver: no option --%s\n", name.c_str());
    std::exit(2);
  }
}

}  // namespace

#if defined(JAXWARP_LIBFUZZER)
// Options come from the environment: JAXWARP_FUZZ="cpu=... cuda=...".
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Trial* const trial = [] {
    for (const std::string& word : words(std::getenv("JAXWARP_FUZZ"))) {
      set_option(word.substr(0, word.find('=')), word.substr(word.find('=') + 1));
    }
    return new Trial;
  }();
  trial->run(Source(data, size, 0));
  return 0;
}
#else
int main(int argc, char** argv) {
  for (int i = 1; i < argc; i += 2) set_option(argv[i] + 2, i + 1 < argc ? argv[i + 1] : "");
  if (options.other_machine() &&
      (options.threads > 1 || !(options.write.empty() || options.expect.empty()))) {
    std::fprintf(stderr,
                 "driver: expected --write or --expect, with --threads 1; got both or more\n");
    return 2;
  }
  Trial trial;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  std::atomic<uint64_t> next{options.first};
  std::vector<std::thread> threads;
  for (int t = 0; t < options.threads; ++t) {
    threads.emplace_back([&] {
      for (uint64_t i; (i = next++) < options.calls && elapsed() < options.seconds;) {
        case_number = i;
        trial.run(Source(nullptr, 0, options.seed * 0x9e3779b97f4a7c15u + i * 0xd1342543de82ef95u));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  trial.finish();
  const auto shown = [](const std::atomic<uint64_t>& n) {
    return static_cast<unsigned long long>(n.load());
  };
  std::printf(
      "%llu cases, %llu calls in %.1f s: %llu cases refused, %llu without memory, %llu "
      "compared between CPU and CUDA\n",
      shown(trial.count.cases), shown(trial.count.calls), elapsed(), shown(trial.count.errors),
      shown(trial.count.no_memory), shown(trial.count.compared));
  if (!options.expect.empty()) {
    std::printf(
        "another machine: %llu with the same bits, %llu close, %llu with exp and no bound\n",
        shown(trial.count.equal), shown(trial.count.near), shown(trial.count.unsteady));
  }
  if (trial.count.cases == 0) {
    std::fprintf(stderr, "driver: expected cases, got none; give it more --calls\n");
    return 1;
  }
}
#endif
