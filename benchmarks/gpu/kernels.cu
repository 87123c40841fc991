// Times the CUDA kernels alone, with CUDA events, against a copy on the device: no Python, no XLA.
// CONTRIBUTING.md says how it is built; `--help` lists the options.
//
// Writes one JSON object a line: the device, the copy, then each kernel with its time and with the
// sum and norm of every result, by which two builds are compared.
#define JAXWARP_METHOD kLinear
#define JAXWARP_DIMS 2
#define JAXWARP_FLOAT32_ONLY

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../../src/warp_cuda.cu"

namespace jaxwarp {
namespace {

constexpr int kSets = 3;  // of inputs and outputs, used in turn, so that no cache holds them
constexpr int kWarmUps = 6, kMeans = 7, kCalls = 21;  // of each set as many
constexpr int64_t kMaxElements = int64_t(1) << 31;    // of an array: the hash takes 32 bits

constexpr char kUsage[] =
    "usage: kernels [--sizes HxWxC,...] [--kernels NAME,...] [--motion smooth|random] [--once]\n"
    "        [--copy-bytes N]\n"
    "  --sizes       of the images, such as 1080x1920x3,16x24x4\n"
    "  --kernels     such as gather,'splat average'; they run in an order of their own\n"
    "  --motion      one of the two; both unless given\n"
    "  --once        launches each kernel once and times nothing: for ncu and compute-sanitizer\n"
    "  --copy-bytes  of the copy that times are compared with; 1 GiB unless given\n";

// ---------------------------------------------------------------------------- lines of JSON

std::string quoted(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return result += '"';
}

// All digits of it. A NaN is written as Python's json reads it.
std::string number(double value, int digits = 17) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char text[40];
  std::snprintf(text, sizeof(text), "%.*g", digits, value);
  return text;
}

void write_line(const std::string& members) {
  std::printf("{%s}\n", members.c_str());
  std::fflush(stdout);
}

[[noreturn]] void fail(const std::string& text) {
  write_line("\"error\": " + quoted(text));
  std::fprintf(stderr, "kernels: %s\n", text.c_str());
  std::exit(1);
}

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) fail(what + ": " + cudaGetErrorString(status));
}

// ---------------------------------------------------------------------------- arrays

// float32 (count,) on the device.
struct Array {
  float* data = nullptr;
  int64_t count = 0;

  explicit Array(int64_t n) : count(n) {
    check(cudaMalloc(reinterpret_cast<void**>(&data), bytes()),
          "cudaMalloc of " + std::to_string(bytes()) + " bytes");
  }
  Array(Array&& other) noexcept
      : data(std::exchange(other.data, nullptr)), count(std::exchange(other.count, 0)) {}
  ~Array() { cudaFree(data); }

  size_t bytes() const { return static_cast<size_t>(count) * sizeof(float); }
};

struct Size {
  int64_t height, width, channels;

  int64_t pixels() const { return height * width; }
  std::string text() const {
    return std::to_string(height) + "x" + std::to_string(width) + "x" + std::to_string(channels);
  }
};

// What the kernels read and write.
struct Arrays {
  Array image, flow, ct;  // (H, W, C), (H, W, 2) pixels, (H, W, C): the cotangent of a result
  Array gathered, splatted, coverage;   // (H, W, C), (H, W, C), (H, W)
  Array image_gradient, flow_gradient;  // as image and flow

  explicit Arrays(const Size& size)
      : image(size.pixels() * size.channels),
        flow(size.pixels() * 2),
        ct(image.count),
        gathered(image.count),
        splatted(image.count),
        coverage(size.pixels()),
        image_gradient(image.count),
        flow_gradient(flow.count) {}
};

// ---------------------------------------------------------------------------- inputs

// Integer arithmetic, exact float32 and one sine in float64: tests/test_kernels_benchmark.py has
// the same numbers from NumPy.

// MurmurHash3's last step, of element i of the array with this seed.
JAXWARP_HD uint32_t hash(int64_t i, uint32_t seed) {
  uint32_t h = static_cast<uint32_t>(i) + seed * 0x9e3779b9u;
  h = (h ^ h >> 16) * 0x85ebca6bu;
  h = (h ^ h >> 13) * 0xc2b2ae35u;
  return h ^ h >> 16;
}

// Multiples of 2^-24 in [low, low + 1).
struct Noise {
  uint32_t seed;
  float low;
  JAXWARP_HD float operator()(int64_t i) const {
    return static_cast<float>(hash(i, seed) >> 8) * 0x1p-24f + low;
  }
};

// Displacements are odd multiples of 1/32 pixel: no position is on a kink, where a gradient would
// depend on rounding.
JAXWARP_HD float odd_32nds(int k) { return static_cast<float>(2 * k + 1) / 32; }

// Within 64 pixels.
struct RandomFlow {
  uint32_t seed;
  JAXWARP_HD float operator()(int64_t i) const {
    return odd_32nds(static_cast<int>(hash(i, seed) >> 21) - 1024);
  }
};

// Within 8 pixels, one period of a sine over the image. The phase of 1 radian keeps the sine off
// the steps of floor, so that one of another library steps at the same places.
struct SmoothFlow {
  int64_t width, height;
  JAXWARP_HD float operator()(int64_t i) const {
    const int64_t n = i / 2, axis = i % 2;  // axis 0 is x
    const double x = static_cast<double>(n % width) / static_cast<double>(width);
    const double y = static_cast<double>(n / width) / static_cast<double>(height);
    const double angle = 6.283185307179586 * (x + y) + static_cast<double>(1 + 2 * axis);
    return odd_32nds(static_cast<int>(std::floor(128 * std::sin(angle))));
  }
};

template <class Values>
__global__ void fill_kernel(float* data, int64_t count, const Values values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) data[i] = values(i);
}

template <class Values>
void fill(cudaStream_t stream, const Array& array, const Values& values) {
  launch_threads(stream, array.count, 1, fill_kernel<Values>, array.data, array.count, values);
  check(cudaGetLastError(), "fill_kernel");
}

void fill_inputs(cudaStream_t stream, const Arrays& arrays, const Size& size,
                 const std::string& motion) {
  fill(stream, arrays.image, Noise{0, 0});
  fill(stream, arrays.ct, Noise{1, -0.5f});
  if (motion == "smooth") {
    fill(stream, arrays.flow, SmoothFlow{size.width, size.height});
  } else {
    fill(stream, arrays.flow, RandomFlow{2});
  }
}

// The sum and the 2-norm of an array, both summed in float64.
struct Checksum {
  double sum = 0, norm = 0;

  Checksum(cudaStream_t stream, const Array& array) {
    std::vector<float> host(static_cast<size_t>(array.count));
    check(cudaMemcpyAsync(host.data(), array.data, array.bytes(), cudaMemcpyDeviceToHost, stream),
          "cudaMemcpyAsync to the host");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    for (const float value : host) {
      sum += value;
      norm += static_cast<double>(value) * value;
    }
    norm = std::sqrt(norm);
  }
};

// ---------------------------------------------------------------------------- kernels

struct Argument {
  const char* name;  // of the operand
  Operand Call::* operand;
  Array Arrays::* array;
};

struct Kernel {
  const char* name;
  void (*enqueue)(cudaStream_t, const Call&);
  Reduce reduce;
  std::vector<Argument> inputs, outputs;
  const char* after = nullptr;  // the kernel whose results it reads

  // Each input read once and each output written once.
  double bytes(const Arrays& arrays) const {
    size_t sum = 0;
    for (const Argument& argument : inputs) sum += (arrays.*argument.array).bytes();
    for (const Argument& argument : outputs) sum += (arrays.*argument.array).bytes();
    return static_cast<double>(sum);
  }
};

// In an order in which each comes behind the one that it reads from.
const std::vector<Kernel>& all_kernels() {
  using Kernels = CudaKernels<Method::kLinear, 2>;
  static const Argument image = {"image", &Call::image, &Arrays::image};
  static const Argument values = {"values", &Call::values, &Arrays::image};
  static const Argument points = {"points", &Call::points, &Arrays::flow};
  static const Argument ct_values = {"ct_values", &Call::ct_values, &Arrays::ct};
  static const Argument ct_points = {"ct_points", &Call::ct_points, &Arrays::flow_gradient};
  static const Argument splatted = {"image", &Call::image, &Arrays::splatted};
  static const Argument coverage = {"coverage", &Call::coverage, &Arrays::coverage};
  static const std::vector<Kernel> kernels = {
      {"gather",
       Kernels::gather,
       Reduce::kSum,
       {image, points},
       {{"values", &Call::values, &Arrays::gathered}}},
      {"gather_vjp",
       Kernels::gather_vjp,
       Reduce::kSum,
       {image, points, ct_values},
       {{"ct_image", &Call::ct_image, &Arrays::image_gradient}, ct_points}},
      {"gather_vjp flow",
       Kernels::gather_vjp,
       Reduce::kSum,
       {image, points, ct_values},
       {ct_points}},
      {"splat average", Kernels::splat, Reduce::kAverage, {values, points}, {splatted, coverage}},
      {"splat_vjp average",
       Kernels::splat_vjp,
       Reduce::kAverage,
       {values, points, {"ct_image", &Call::ct_image, &Arrays::ct}, splatted, coverage},
       {{"ct_values", &Call::ct_values, &Arrays::image_gradient}, ct_points},
       "splat average"},
  };
  return kernels;
}

const Kernel* find_kernel(std::string_view name) {
  for (const Kernel& kernel : all_kernels()) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

// What Decoder makes of backward_warp or forward_warp: channels last, no batch.
Call call_of(const Kernel& kernel, const Arrays& arrays, const Size& size) {
  Call call{};
  call.sampling.method = Method::kLinear;
  for (Boundary& along : call.sampling.boundary) along = Boundary::kConstant;
  call.sampling.cubic_a = -0.5;
  call.displacement = true;
  call.reduce = kernel.reduce;
  call.dims = 2;
  call.value_type = ffi::F32;

  Shape<int64_t>& shape = call.shape;
  const int64_t extent[] = {size.width, size.height, 1};
  int64_t plane = 1;
  for (int a = 0; a < 3; ++a) {
    shape.size[a] = shape.grid[a] = extent[a];
    shape.plane_stride[a] = plane;
    shape.stride[a] = plane * size.channels;
    plane *= extent[a];
  }
  shape.channels = shape.point_stride = size.channels;
  shape.channel_stride = shape.point_channel_stride = 1;
  shape.points = size.pixels();

  const auto bind = [&](const std::vector<Argument>& arguments, bool output) {
    for (const Argument& argument : arguments) {
      const Array& array = arrays.*argument.array;
      Operand& operand = call.*argument.operand;
      operand.data = array.data;
      operand.dtype = ffi::F32;
      operand.count = array.count;
      operand.output = output;
    }
  };
  bind(kernel.inputs, false);
  bind(kernel.outputs, true);
  return call;
}

void enqueue(cudaStream_t stream, const Kernel& kernel, const Arrays& arrays, const Size& size) {
  kernel.enqueue(stream, call_of(kernel, arrays, size));
  check(cudaGetLastError(), kernel.name);
}

// ---------------------------------------------------------------------------- times

// Milliseconds of one call enqueue(i), i = 0, 1, ...: the median of several means, after calls that
// load the code.
template <class Enqueue>
double milliseconds(cudaStream_t stream, Enqueue enqueue) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  for (int i = 0; i < kWarmUps; ++i) enqueue(i);
  double means[kMeans];
  for (double& mean : means) {
    float total;
    check(cudaEventRecord(start, stream), "cudaEventRecord");
    for (int i = 0; i < kCalls; ++i) enqueue(i);
    check(cudaEventRecord(stop, stream), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&total, start, stop), "cudaEventElapsedTime");
    mean = static_cast<double>(total) / kCalls;
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  std::nth_element(means, means + kMeans / 2, means + kMeans);
  return means[kMeans / 2];
}

double gb_per_s(double bytes, double ms) { return bytes / ms / 1e6; }

// Of a copy on the device: bytes read and written.
double copy_gb_per_s(cudaStream_t stream, int64_t bytes) {
  const Array from((bytes + 3) / 4), to(from.count);
  check(cudaMemsetAsync(from.data, 0, from.bytes(), stream), "cudaMemsetAsync");
  const double ms = milliseconds(stream, [&](int) {
    check(cudaMemcpyAsync(to.data, from.data, from.bytes(), cudaMemcpyDeviceToDevice, stream),
          "cudaMemcpyAsync on the device");
  });
  return gb_per_s(2.0 * static_cast<double>(from.bytes()), ms);
}

// The sums and norms of what one call writes. Its outputs are NaN before, so that an element that
// is not written shows.
std::string checked(cudaStream_t stream, const Kernel& kernel, const Arrays& arrays,
                    const Size& size) {
  for (const Argument& output : kernel.outputs) {
    const Array& array = arrays.*output.array;
    check(cudaMemsetAsync(array.data, 0xff, array.bytes(), stream), "cudaMemsetAsync");
  }
  enqueue(stream, kernel, arrays, size);
  check(cudaStreamSynchronize(stream), std::string(kernel.name) + " of " + size.text());
  std::string sums, norms;
  for (const Argument& output : kernel.outputs) {
    const Checksum checksum(stream, arrays.*output.array);
    const std::string name = (sums.empty() ? "" : ", ") + quoted(output.name) + ": ";
    sums += name + number(checksum.sum);
    norms += name + number(checksum.norm);
  }
  return "\"sums\": {" + sums + "}, \"norms\": {" + norms + "}";
}

// ---------------------------------------------------------------------------- options

struct Options {
  std::vector<Size> sizes = {{1080, 1920, 3}, {2160, 3840, 4}, {1080, 1920, 4}, {1080, 1920, 64}};
  std::vector<std::string> motions = {"smooth", "random"};
  std::vector<const Kernel*> kernels;  // in the order of all_kernels()
  bool once = false;
  int64_t copy_bytes = int64_t(1) << 30;

  bool has(const Kernel* kernel) const {
    return std::find(kernels.begin(), kernels.end(), kernel) != kernels.end();
  }
};

std::vector<std::string> parts_of(std::string_view text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// 0 where the text is no positive number below the largest size of an array.
int64_t positive(const std::string& text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc{} && stop == end && value > 0 && value <= kMaxElements ? value : 0;
}

Size size_from(const std::string& text) {
  const auto parts = parts_of(text, 'x');
  int64_t extents[3] = {}, elements = parts.size() == 3 ? 1 : 0;
  for (size_t i = 0; i < 3 && elements > 0; ++i) {
    extents[i] = positive(parts[i]);
    elements = extents[i] <= kMaxElements / elements ? elements * extents[i] : 0;
  }
  if (elements == 0) {
    fail("--sizes: expected HxWxC, such as 16x24x3, of at most 2^31 elements, received '" + text +
         "'");
  }
  return {extents[0], extents[1], extents[2]};
}

Options options_from(int argc, char** argv) {
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&] {
      if (i + 1 == argc) fail(option + ": expected a value, received none");
      return std::string(argv[++i]);
    };
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (option == "--sizes") {
      options.sizes.clear();
      for (const std::string& part : parts_of(value(), ','))
        options.sizes.push_back(size_from(part));
    } else if (option == "--kernels") {
      names = parts_of(value(), ',');
    } else if (option == "--motion") {
      const std::string motion = value();
      if (!(motion == "smooth" || motion == "random")) {
        fail("--motion: expected smooth or random, received '" + motion + "'");
      }
      options.motions = {motion};
    } else if (option == "--once") {
      options.once = true;
    } else if (option == "--copy-bytes") {
      const std::string bytes = value();
      options.copy_bytes = positive(bytes);
      if (options.copy_bytes == 0) {
        fail("--copy-bytes: expected a number from 1 to 2^31, received '" + bytes + "'");
      }
    } else {
      fail("expected --sizes, --kernels, --motion, --once, --copy-bytes or --help, received '" +
           option + "'");
    }
  }

  for (const std::string& name : names) {
    if (find_kernel(name) != nullptr) continue;
    std::string known;
    for (const Kernel& kernel : all_kernels()) {
      known += (known.empty() ? "" : ", ") + std::string(kernel.name);
    }
    fail("--kernels: expected some of " + known + ", received '" + name + "'");
  }
  for (const Kernel& kernel : all_kernels()) {
    const bool named = std::find(names.begin(), names.end(), kernel.name) != names.end();
    if (names.empty() || named) options.kernels.push_back(&kernel);
  }
  return options;
}

// ---------------------------------------------------------------------------- the program

void write_device() {
  const auto version = [](int number) {  // 13020: 13.2
    return quoted(std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10));
  };
  cudaDeviceProp device;
  int driver = 0, runtime = 0;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  const std::string capability = std::to_string(device.major) + "." + std::to_string(device.minor);
  write_line("\"device\": " + quoted(device.name) +
             ", \"compute_capability\": " + quoted(capability) +
             ", \"driver\": " + version(driver) + ", \"runtime\": " + version(runtime));
}

// One line for each kernel. copy: GB/s that times are compared with.
void run_kernels(cudaStream_t stream, const Options& options, const Size& size,
                 const std::string& motion, double copy) {
  std::vector<Arrays> sets;
  for (int i = 0; i < (options.once ? 1 : kSets); ++i) {
    sets.emplace_back(size);
    fill_inputs(stream, sets.back(), size, motion);
  }
  for (const Kernel* kernel : options.kernels) {
    const Kernel* before = kernel->after == nullptr ? nullptr : find_kernel(kernel->after);
    if (before != nullptr && !options.has(before)) {
      for (const Arrays& arrays : sets) enqueue(stream, *before, arrays, size);
    }
    const std::string checksums = checked(stream, *kernel, sets[0], size);
    const double bytes = kernel->bytes(sets[0]);
    std::string times;
    if (!options.once) {
      const double ms = milliseconds(stream, [&](int i) {
        enqueue(stream, *kernel, sets[static_cast<size_t>(i % kSets)], size);
      });
      times = "\"ms\": " + number(ms, 6) + ", \"gb_per_s\": " + number(gb_per_s(bytes, ms), 6) +
              ", \"to_copy\": " + number(copy / gb_per_s(bytes, ms), 6) + ", ";
    }
    write_line("\"kernel\": " + quoted(kernel->name) + ", \"size\": " + quoted(size.text()) +
               ", \"motion\": " + quoted(motion) + ", " + times + "\"bytes\": " + number(bytes) +
               ", " + checksums);
  }
}

void run(const Options& options) {
  write_device();
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  double copy = 0;
  if (!options.once) {
    copy = copy_gb_per_s(stream, options.copy_bytes);
    write_line("\"copy_gb_per_s\": " + number(copy, 6));
  }
  for (const Size& size : options.sizes) {
    for (const std::string& motion : options.motions) {
      run_kernels(stream, options, size, motion, copy);
    }
  }
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

}  // namespace
}  // namespace jaxwarp

int main(int argc, char** argv) { jaxwarp::run(jaxwarp::options_from(argc, argv)); }
