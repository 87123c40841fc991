// CUDA's runtime for a machine without a GPU: linked to objects that nvcc has written, it takes the
// PTX out of them and interprets it at each launch, so that what nvcc compiled for the device runs.
// Device memory is the host's; threads run one after the other, and the lanes of a warp take turns
// where they shuffle. What ptxas makes of PTX, and threads at the same time, are not seen.
//
// A launch fails, with a text for cudaGetErrorString that names kernel, instruction and thread, on
//   - an access at an address that is not a multiple of its (vector's) size, or outside of the
//     parameters or local memory that it names, or, in a process with AddressSanitizer, of a heap
//     block;
//   - a division of integers by zero;
//   - a shuffle that not all lanes of its mask come to, or that reads from a lane outside of it;
//   - a branch, access or shuffle that depends on a register that was never written; but into local
//     memory, such a register is stored as bytes 0xff, which memory that was never written has too;
//   - with "races" in JAXWARP_PTX_MODE, a write to what another thread of the launch accesses too
//     (reads beside atomics are let through);
//   - an instruction that is not implemented: those are that the kernels have needed;
//   - a word in JAXWARP_PTX_MODE that is not known, so that no check is left out by a typing error.
// "backwards" in JAXWARP_PTX_MODE turns the order of blocks, warps and lanes around.
//
// The objects come from nvcc -gencode arch=compute_90,code=compute_90 --no-compress -cudart none.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cfenv>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "portable.h"

// AddressSanitizer's, where it is there. This file itself is not built with it: each access by the
// interpreter would take as long as those that it watches.
extern "C" void* __asan_region_is_poisoned(void* first, size_t bytes) __attribute__((weak));

namespace {

using jaxwarp::float16;

constexpr int kWarp = 32;
using Word = uint64_t;  // a register: what reads it takes as many of the low bits as its type has
using Slot = uint32_t;  // the place of a register, constant, special register or symbol's address

// Slots that every kernel has.
enum : Slot { kTrue, kSink, kTid, kNtid = kTid + 3, kCtaid = kNtid + 3, kNctaid = kCtaid + 3 };
enum : Slot { kLane = kNctaid + 3, kSpecials };
constexpr const char* kSpecialNames[] = {
    "",         "_",        "%tid.x",   "%tid.y",    "%tid.z",    "%ntid.x",   "%ntid.y", "%ntid.z",
    "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Thread;
struct Instruction;
using Work = void (*)(Thread&, const Instruction&);

// What an operand that was never written means: an error, or for an address alone; a result that
// counts as not written either; or that only where the result depends on it.
enum class Unwritten { kPasses, kIsAnError, kIsAnErrorInAddress, kSelect, kAnd, kOr };

struct Instruction {
  Work work = nullptr;
  Slot guard = kTrue;  // runs where its value is `runs_where`
  bool runs_where = true;
  Unwritten unwritten = Unwritten::kPasses;
  int tos = 0, froms = 0;
  std::array<Slot, 4> to{};
  std::array<Slot, 8> from{};
  int64_t immediate = 0;  // an address' offset, a branch's target, a mode
  std::string_view text;
};

struct Region {
  Slot address;
  size_t bytes;
};

struct Kernel {
  std::string_view text;  // of its PTX, with its name in front
  std::once_flag parsed;
  std::string error;  // why it cannot run
  std::vector<Instruction> code;
  std::vector<Word> slots;         // at the beginning
  std::vector<uint8_t> written;    // of slots: all but the registers
  std::vector<std::string> names;  // of slots
  std::vector<Region> parameters, locals;
  bool shuffles = false;

  std::string name() const {
    const std::string mangled(text.substr(0, text.find_first_of(" \t\n(")));
    const std::unique_ptr<char, void (*)(void*)> name(
        abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr), std::free);
    return name ? name.get() : mangled;
  }
};

// Which threads of a launch have accessed which bytes, two and two.
class Races {
 public:
  enum Kind { kRead, kWrite, kAtomic };

  void add(Word address, size_t bytes, Kind kind, uint32_t thread) {
    for (Word pair = address / 2; pair <= (address + bytes - 1) / 2; ++pair) {
      auto& threads = threads_[pair];
      for (const Kind other : {kRead, kWrite, kAtomic}) {
        const uint32_t by = threads[other];
        if ((kind == kWrite || other == kWrite) && by != kNone && by != thread) {
          throw Fault("a race: what a thread writes is accessed by another one");
        }
      }
      threads[kind] = threads[kind] == kNone || threads[kind] == thread ? thread : kSeveral;
    }
  }

 private:
  static constexpr uint32_t kNone = 0, kSeveral = UINT32_MAX;  // threads count from 1 on
  std::unordered_map<Word, std::array<uint32_t, 3>> threads_;
};

struct Thread {
  enum State { kRuns, kWaits, kEnds };

  const Kernel& kernel;
  Word* slots;
  uint8_t* written;
  Races* races;  // null: not asked for
  uint32_t number;
  size_t next = 0;
  State state = kRuns;

  // Until it ends or waits for the other lanes.
  void run() {
    try {
      run_instructions();
    } catch (const Fault& fault) {
      throw located(fault.what());
    }
  }

  // The fault of the instruction that ran last.
  Fault located(const std::string& what) const {
    const Instruction& i = kernel.code[next - 1];
    const auto special = [&](int slot) { return std::to_string(slots[slot]); };
    std::string never;
    const auto note = [&](Slot slot) {
      if (!written[slot]) never += (never.empty() ? ", never written: " : " ") + kernel.names[slot];
    };
    note(i.guard);
    std::for_each(i.from.begin(), i.from.begin() + i.froms, note);
    return Fault(what + " at `" + std::string(i.text) + "`, block " + special(kCtaid) + " " +
                 special(kCtaid + 1) + ", thread " + special(kTid) + never);
  }

  void run_instructions() {
    while (state == kRuns) {
      const Instruction& i = kernel.code[next++];
      if (!written[i.guard]) throw Fault("a predicate that was never written");
      if ((slots[i.guard] != 0) != i.runs_where) continue;
      const bool known = is_written(i);
      if (!known && i.unwritten == Unwritten::kIsAnError) {
        throw Fault("an operand that was never written");
      }
      for (int k = 0; k < i.tos; ++k) written[i.to[k]] = known;
      i.work(*this, i);
    }
  }

  bool is_written(const Instruction& i) const {
    const auto decides = [&](int k, bool value) {
      return written[i.from[k]] && (slots[i.from[k]] != 0) == value;
    };
    switch (i.unwritten) {
      case Unwritten::kIsAnErrorInAddress:
        if (!written[i.from[0]]) throw Fault("an address that was never written");
        return true;
      case Unwritten::kSelect:
        return written[i.from[2]] && written[i.from[slots[i.from[2]] != 0 ? 0 : 1]];
      case Unwritten::kAnd:
        if (decides(0, false) || decides(1, false)) return true;
        break;
      case Unwritten::kOr:
        if (decides(0, true) || decides(1, true)) return true;
        break;
      default:
        break;
    }
    return std::all_of(i.from.begin(), i.from.begin() + i.froms,
                       [&](Slot slot) { return written[slot] != 0; });
  }
};

template <class T>
T get(const Thread& t, Slot slot) {
  if constexpr (std::is_same_v<T, bool>) return t.slots[slot] != 0;  // `mov.pred %p1, -1`: all bits
  T value;
  std::memcpy(&value, &t.slots[slot], sizeof(T));
  return value;
}
template <class T>
void set(Thread& t, Slot slot, T value) {
  Word word = 0;
  if constexpr (std::is_integral_v<T>) {
    word = static_cast<Word>(value);  // a narrow load into a wide register extends the sign
  } else {
    std::memcpy(&word, &value, sizeof(T));
  }
  t.slots[slot] = word;
}

// ------------------------------------------------------------------------------- instructions

// By name and type, such as "add.f32". Types of bits are those of unsigned integers, and what
// changes nothing here, such as ".uni" or ".global", is left out of a name.
class Table {
 public:
  Table();
  Work find(const std::string& name) const {
    const auto found = works_.find(name);
    return found == works_.end() ? nullptr : found->second;
  }

 private:
  template <class... T>
  struct Types {};
  using Signed = Types<int16_t, int32_t, int64_t>;
  using Unsigned = Types<uint16_t, uint32_t, uint64_t>;
  using Integers = Types<int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t>;
  using Reals = Types<float, double>;
  using Numbers = Types<int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t, float, double>;
  using Stored = Types<int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t,
                       float, double>;
  using Converted = Types<int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t,
                          float16, float, double>;

  template <class T>
  static std::string name_of() {
    if constexpr (std::is_same_v<T, bool>) return ".pred";
    constexpr bool kReal = std::is_floating_point_v<T> || std::is_same_v<T, float16>;
    const char letter = kReal ? 'f' : std::is_signed_v<T> ? 's' : 'u';
    return std::string(".") + letter + std::to_string(8 * sizeof(T));
  }

  // F is a function of as many operands as `kOperands`; its result has their type, or is a bool.
  template <int kOperands, class F, class T>
  static void apply(Thread& t, const Instruction& i) {
    const auto operand = [&](int k) { return get<T>(t, i.from[k]); };
    const auto result = [&] {
      if constexpr (kOperands == 1) return F{}(operand(0));
      if constexpr (kOperands == 2) return F{}(operand(0), operand(1));
      if constexpr (kOperands == 3) return F{}(operand(0), operand(1), operand(2));
    }();
    constexpr bool kTest = std::is_same_v<decltype(result), const bool>;
    set(t, i.to[0], static_cast<std::conditional_t<kTest, bool, T>>(result));
  }
  template <int kOperands, class F, class... T>
  void add(const std::string& name, Types<T...>, F) {
    ((works_[name + name_of<T>()] = apply<kOperands, F, T>), ...);
  }
  template <class... T, class Body>
  static void for_each(Types<T...>, Body body) {
    (body.template operator()<T>(name_of<T>()), ...);
  }

  std::unordered_map<std::string, Work> works_;
};

// Integers wrap around (-fwrapv), shifts are by at most all bits.
template <class T>
T divided(T a, T b, bool remainder) {
  if (b == 0) throw Fault("a division by zero");
  if (std::is_signed_v<T> && b == T(-1)) return remainder ? T(0) : static_cast<T>(-a);
  return static_cast<T>(remainder ? a % b : a / b);
}
template <class T>
T shifted(T a, uint32_t by, bool left) {
  if (by >= 8 * sizeof(T)) return left || a >= T(0) ? T(0) : static_cast<T>(-1);
  return static_cast<T>(left ? static_cast<Word>(a) << by : a >> by);
}
// Of a number and NaN, the number; -0 is less than +0.
template <class T>
bool first_is_less(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(b)) return true;
    if (a == b) return std::signbit(a);
  }
  return a < b;
}
template <class T>
T lesser(T a, T b) {
  return first_is_less(a, b) ? a : b;
}
template <class T>
T greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
  }
  return first_is_less(a, b) ? b : a;
}

void multiply_add_downward(Thread& t, const Instruction& i) {
  std::fesetround(FE_DOWNWARD);
  const volatile float a = get<float>(t, i.from[0]), b = get<float>(t, i.from[1]);
  const volatile float result = std::fma(a, b, get<float>(t, i.from[2]));
  std::fesetround(FE_TONEAREST);
  set<float>(t, i.to[0], result);
}

// The operands have half as many bits as the result.
template <class T, class Wide>
void multiply_wide(Thread& t, const Instruction& i) {
  Wide result = static_cast<Wide>(get<T>(t, i.from[0])) * static_cast<Wide>(get<T>(t, i.from[1]));
  if (i.froms == 3) result += get<Wide>(t, i.from[2]);
  set(t, i.to[0], result);
}

void move(Thread& t, const Instruction& i) { t.slots[i.to[0]] = t.slots[i.from[0]]; }
void select(Thread& t, const Instruction& i) {
  t.slots[i.to[0]] = t.slots[i.from[t.slots[i.from[2]] != 0 ? 0 : 1]];
}
// Between one register and those that are its parts, of so many bits.
template <int kPart>
void move_parts(Thread& t, const Instruction& i) {
  constexpr Word kMask = (Word(1) << kPart) - 1;
  Word whole = 0;
  for (int k = 0; k < i.froms; ++k) whole |= (t.slots[i.from[k]] & kMask) << (kPart * k);
  if (i.froms == 1) whole = t.slots[i.from[0]];
  for (int k = 0; k < i.tos; ++k) {
    t.slots[i.to[k]] = i.tos == 1 ? whole : whole >> (kPart * k) & kMask;
  }
}
// Each byte of the result is one of eight, by a number of four bits; the highest of these: its
// sign.
void permute(Thread& t, const Instruction& i) {
  const Word bytes = get<uint32_t>(t, i.from[0]) | Word{get<uint32_t>(t, i.from[1])} << 32;
  const auto choice = get<uint32_t>(t, i.from[2]);
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    uint32_t byte = bytes >> (8 * (choice >> (4 * k) & 7)) & 255;
    if (choice >> (4 * k) & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * k);
  }
  set(t, i.to[0], result);
}

// How a conversion rounds a real number to an integral one, if it does; and whether to [0, 1].
enum : int64_t { kExact, kNearest, kTowardZero, kDown, kUp, kSaturate };

template <class Real>
Real integral(Real v, int64_t mode) {
  switch (mode) {
    case kNearest:
      return std::nearbyint(v);
    case kTowardZero:
      return std::trunc(v);
    case kDown:
      return std::floor(v);
    case kUp:
      return std::ceil(v);
    default:
      return v;
  }
}
template <class To, class From>
void convert(Thread& t, const Instruction& i) {
  constexpr bool kFromInteger = std::is_integral_v<From>;
  const From source = get<From>(t, i.from[0]);
  if constexpr (kFromInteger && std::is_same_v<To, float16>) {
    set(t, i.to[0], jaxwarp::narrow<float16>(static_cast<float>(source)));
  } else if constexpr (kFromInteger) {
    set(t, i.to[0], static_cast<To>(source));
  } else {
    auto v = integral(jaxwarp::widen(source), i.immediate);
    using Real = decltype(v);
    if (i.immediate == kSaturate) v = v > 0 ? std::min(v, Real(1)) : Real(0);
    if constexpr (std::is_integral_v<To>) {  // what it cannot hold becomes its limit
      using Limits = std::numeric_limits<To>;
      constexpr bool kWide = sizeof(To) == 8 || sizeof(From) == 8;
      constexpr To kOfNan = kWide ? static_cast<To>(Word(1) << (8 * sizeof(To) - 1)) : To(0);
      set(t, i.to[0],
          std::isnan(v)                           ? kOfNan
          : v <= static_cast<Real>(Limits::min()) ? Limits::min()
          : v >= static_cast<Real>(Limits::max()) ? Limits::max()
                                                  : static_cast<To>(v));
    } else if constexpr (std::is_same_v<To, float16>) {
      set(t, i.to[0], jaxwarp::narrow<float16>(static_cast<float>(v)));
    } else {
      set(t, i.to[0], static_cast<To>(v));
    }
  }
}

// ------------------------------------------------------------------------------- memory

enum class Space { kGlobal, kParameter, kLocal };

template <class T, Space kSpace>
uint8_t* place(Thread& t, const Instruction& i, int count, Races::Kind kind) {
  const Word address = t.slots[i.from[0]] + static_cast<Word>(i.immediate);
  const size_t bytes = sizeof(T) * static_cast<size_t>(count);
  if (address % bytes != 0) {
    throw Fault("a misaligned address for an access of " + std::to_string(bytes) + " bytes");
  }
  uint8_t* const memory = reinterpret_cast<uint8_t*>(address);
  if constexpr (kSpace == Space::kGlobal) {
    if (__asan_region_is_poisoned && __asan_region_is_poisoned(memory, bytes)) {
      throw Fault("an access outside of a heap block");
    }
    if (t.races != nullptr) t.races->add(address, bytes, kind, t.number);
  } else {
    const auto& regions = kSpace == Space::kLocal ? t.kernel.locals : t.kernel.parameters;
    const bool inside = std::any_of(regions.begin(), regions.end(), [&](const Region& region) {
      const Word first = t.slots[region.address];
      return address >= first && address + bytes <= first + region.bytes;
    });
    if (!inside) throw Fault("an access outside of parameters or local memory");
  }
  return memory;
}
template <class T, Space kSpace>
void load(Thread& t, const Instruction& i) {
  T values[4];
  std::memcpy(values, place<T, kSpace>(t, i, i.tos, Races::kRead), sizeof(T) * i.tos);
  for (int k = 0; k < i.tos; ++k) set(t, i.to[k], values[k]);
}
template <class T, Space kSpace>
void store(Thread& t, const Instruction& i) {
  const int count = i.froms - 1;
  T values[4];
  for (int k = 0; k < count; ++k) {
    values[k] = get<T>(t, i.from[1 + k]);
    // Its slot may hold what an earlier thread has written.
    const bool unwritten = kSpace == Space::kLocal && !t.written[i.from[1 + k]];
    if (unwritten) std::memset(&values[k], 0xff, sizeof(T));
  }
  std::memcpy(place<T, kSpace>(t, i, count, Races::kWrite), values, sizeof(T) * count);
}
template <class F, class T>
void change(Thread& t, const Instruction& i) {
  const int count = i.froms - 1;
  uint8_t* const target = place<T, Space::kGlobal>(t, i, count, Races::kAtomic);
  for (int k = 0; k < count; ++k) {
    T old;
    std::memcpy(&old, target + k * sizeof(T), sizeof(T));
    const T value = static_cast<T>(F{}(old, get<T>(t, i.from[1 + k])));
    std::memcpy(target + k * sizeof(T), &value, sizeof(T));
    if (k < i.tos) set(t, i.to[k], old);
  }
}

// ------------------------------------------------------------------------------- control

void jump(Thread& t, const Instruction& i) { t.next = static_cast<size_t>(i.immediate); }
void end(Thread& t, const Instruction&) { t.state = Thread::kEnds; }
void wait(Thread& t, const Instruction&) { t.state = Thread::kWaits; }  // until `meet`

enum : int64_t { kShuffleDown, kShuffleUp, kShuffleXor, kShuffleTo };

bool waits(const Thread& t) { return t.state == Thread::kWaits; }

// Exchanges values among lanes of which all have come to the same shuffle.
void meet(std::vector<Thread>& warp) {
  const auto instruction = [](const Thread& t) { return t.kernel.code[t.next - 1]; };
  const auto mask_of = [&](const Thread& t) { return get<uint32_t>(t, instruction(t).from[3]); };
  const auto comes = [&](unsigned lane, const Thread& t) {
    return lane < warp.size() && waits(warp[lane]) && warp[lane].next == t.next &&
           mask_of(warp[lane]) == mask_of(t);
  };
  for (unsigned first = 0; first < warp.size(); ++first) {
    if (!waits(warp[first])) continue;
    const Instruction i = instruction(warp[first]);
    const uint32_t mask = mask_of(warp[first]);
    const auto in_mask = [&](int lane) { return (mask >> lane & 1) != 0; };
    if (!in_mask(first)) {
      throw warp[first].located("a shuffle by a lane that is not in its own mask");
    };
    bool whole = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      whole = whole && (!in_mask(lane) || comes(lane, warp[first]));
    }
    if (!whole) continue;
    std::array<uint32_t, kWarp> given{};
    for (unsigned lane = 0; lane < warp.size(); ++lane)
      given[lane] = get<uint32_t>(warp[lane], i.from[0]);
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!in_mask(lane)) continue;
      Thread& t = warp[lane];
      const int by = get<uint32_t>(t, i.from[1]) & 31, control = get<uint32_t>(t, i.from[2]);
      const int segment = control >> 8 & 31, last = (lane & segment) | (control & 31 & ~segment);
      int source = i.immediate == kShuffleDown  ? lane + by
                   : i.immediate == kShuffleUp  ? lane - by
                   : i.immediate == kShuffleXor ? lane ^ by
                                                : (lane & segment) | (by & ~segment);
      const bool inside = i.immediate == kShuffleUp ? source >= last : source <= last;
      if (!inside) source = lane;
      if (!in_mask(source)) throw t.located("a shuffle from a lane that is not in the mask");
      set(t, i.to[0], given[source]);
      if (i.tos > 1) set(t, i.to[1], inside);
      t.state = Thread::kRuns;
    }
    return;
  }
  throw std::find_if(warp.begin(), warp.end(), waits)
      ->located("a shuffle that not all lanes of its mask come to");
}

Table::Table() {
  add<2>("add", Numbers{}, [](auto a, auto b) { return a + b; });
  add<2>("sub", Numbers{}, [](auto a, auto b) { return a - b; });
  add<2>("mul", Reals{}, [](auto a, auto b) { return a * b; });
  // In 64 bits, since C++ would multiply 16 of them in a signed int.
  add<2>("mul", Integers{}, [](auto a, auto b) { return Word(a) * Word(b); });
  add<3>("mad", Integers{}, [](auto a, auto b, auto c) { return Word(a) * Word(b) + Word(c); });
  add<2>("div", Reals{}, [](auto a, auto b) { return a / b; });
  add<2>("div", Integers{}, [](auto a, auto b) { return divided(a, b, false); });
  add<2>("rem", Integers{}, [](auto a, auto b) { return divided(a, b, true); });
  add<2>("min", Numbers{}, [](auto a, auto b) { return lesser(a, b); });
  add<2>("max", Numbers{}, [](auto a, auto b) { return greater(a, b); });
  add<3>("fma", Reals{}, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  add<1>("neg", Reals{}, [](auto a) { return -a; });
  add<1>("neg", Signed{}, [](auto a) { return -a; });
  add<1>("abs", Signed{}, [](auto a) { return a < 0 ? -a : a; });
  add<1>("abs", Reals{}, [](auto a) { return std::fabs(a); });
  add<1>("sqrt", Reals{}, [](auto a) { return std::sqrt(a); });
  add<1>("rcp", Reals{}, [](auto a) { return 1 / a; });
  add<2>("copysign", Reals{}, [](auto a, auto b) { return std::copysign(b, a); });
  // An approximation on a GPU, but exact here, as .approx and .full of div, rcp and sqrt are.
  add<1>("ex2.ftz", Types<float>{},
         [](float a) { return static_cast<float>(std::exp2(double{a})); });
  works_["fma.rm.f32"] = multiply_add_downward;

  add<2>("mul.hi", Types<int64_t>{}, [](int64_t a, int64_t b) {
    return static_cast<int64_t>(static_cast<__int128>(a) * b >> 64);
  });
  add<2>("mul.hi", Types<uint64_t>{}, [](Word a, Word b) {
    return static_cast<Word>(static_cast<unsigned __int128>(a) * b >> 64);
  });
  add<2>("mul.hi", Types<int32_t>{}, [](int32_t a, int32_t b) { return int64_t{a} * b >> 32; });
  add<2>("mul.hi", Types<uint32_t>{}, [](uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; });
  for (const std::string name : {"mul.wide", "mad.wide"}) {
    works_[name + ".s16"] = multiply_wide<int16_t, int32_t>;
    works_[name + ".u16"] = multiply_wide<uint16_t, uint32_t>;
    works_[name + ".s32"] = multiply_wide<int32_t, int64_t>;
    works_[name + ".u32"] = multiply_wide<uint32_t, uint64_t>;
  }

  add<2>("and", Unsigned{}, [](auto a, auto b) { return a & b; });
  add<2>("or", Unsigned{}, [](auto a, auto b) { return a | b; });
  add<2>("xor", Unsigned{}, [](auto a, auto b) { return a ^ b; });
  add<1>("not", Unsigned{}, [](auto a) { return ~a; });
  add<2>("and", Types<bool>{}, [](bool a, bool b) { return a && b; });
  add<2>("or", Types<bool>{}, [](bool a, bool b) { return a || b; });
  add<2>("xor", Types<bool>{}, [](bool a, bool b) { return a != b; });
  add<1>("not", Types<bool>{}, [](bool a) { return !a; });
  for_each(Integers{}, [this]<class T>(const std::string& type) {
    works_["shl" + type] = [](Thread& t, const Instruction& i) {
      set(t, i.to[0], shifted(get<T>(t, i.from[0]), get<uint32_t>(t, i.from[1]), true));
    };
    works_["shr" + type] = [](Thread& t, const Instruction& i) {
      set(t, i.to[0], shifted(get<T>(t, i.from[0]), get<uint32_t>(t, i.from[1]), false));
    };
  });

  // With NaN, those that end in "u" are true, the others false.
  add<2>("setp.eq", Numbers{}, [](auto a, auto b) { return a == b; });
  add<2>("setp.ne", Numbers{}, [](auto a, auto b) { return a < b || a > b; });
  add<2>("setp.lt", Numbers{}, [](auto a, auto b) { return a < b; });
  add<2>("setp.le", Numbers{}, [](auto a, auto b) { return a <= b; });
  add<2>("setp.gt", Numbers{}, [](auto a, auto b) { return a > b; });
  add<2>("setp.ge", Numbers{}, [](auto a, auto b) { return a >= b; });
  add<2>("setp.equ", Reals{}, [](auto a, auto b) { return !(a < b || a > b); });
  add<2>("setp.neu", Reals{}, [](auto a, auto b) { return a != b; });
  add<2>("setp.ltu", Reals{}, [](auto a, auto b) { return !(a >= b); });
  add<2>("setp.leu", Reals{}, [](auto a, auto b) { return !(a > b); });
  add<2>("setp.gtu", Reals{}, [](auto a, auto b) { return !(a <= b); });
  add<2>("setp.geu", Reals{}, [](auto a, auto b) { return !(a < b); });
  add<2>("setp.num", Reals{}, [](auto a, auto b) { return a == a && b == b; });
  add<2>("setp.nan", Reals{}, [](auto a, auto b) { return a != a || b != b; });

  for_each(Converted{}, [this]<class To>(const std::string& to) {
    for_each(Converted{}, [&]<class From>(const std::string& from) {
      // By way of float it would be rounded twice.
      constexpr bool kTwice = std::is_same_v<To, float16> && std::is_same_v<From, double>;
      if (!kTwice) works_["cvt" + to + from] = convert<To, From>;
    });
  });
  for_each(Stored{}, [this]<class T>(const std::string& type) {
    works_["ld" + type] = load<T, Space::kGlobal>;
    works_["ld.param" + type] = load<T, Space::kParameter>;
    works_["ld.local" + type] = load<T, Space::kLocal>;
    works_["st" + type] = store<T, Space::kGlobal>;
    works_["st.local" + type] = store<T, Space::kLocal>;
  });
  const auto add_atomic = [this]<class F, class... T>(const std::string& name, Types<T...>, F) {
    for (const char* head : {"atom.", "red."}) {
      ((works_[head + name + name_of<T>()] = change<F, T>), ...);
    }
  };
  add_atomic("add", Numbers{}, [](auto a, auto b) { return a + b; });
  add_atomic("min", Integers{}, [](auto a, auto b) { return lesser(a, b); });
  add_atomic("max", Integers{}, [](auto a, auto b) { return greater(a, b); });
  add_atomic("and", Unsigned{}, [](auto a, auto b) { return a & b; });
  add_atomic("or", Unsigned{}, [](auto a, auto b) { return a | b; });

  for (const char* type :
       {".u16", ".u32", ".u64", ".s16", ".s32", ".s64", ".f32", ".f64", ".pred"}) {
    works_[std::string("mov") + type] = move;
    works_[std::string("selp") + type] = select;
  }
  works_["mov.parts.32"] = move_parts<32>;
  works_["mov.parts.16"] = move_parts<16>;
  works_["cvta.u64"] = works_["cvta.local.u64"] = move;  // there is one address space
  works_["prmt.u32"] = permute;
  works_["shfl.sync.u32"] = wait;
  works_["bra"] = jump;
  works_["ret"] = works_["exit"] = end;
}

const Table& table() {
  static const Table instance;
  return instance;
}

// ------------------------------------------------------------------------------- reading PTX

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}
// At separators outside of braces and brackets.
std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t first = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : separator;
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (i < text.size() && (c != separator || depth != 0)) continue;
    const std::string_view part = trimmed(text.substr(first, i - first));
    if (!part.empty()) parts.push_back(part);
    first = i + 1;
  }
  return parts;
}

class Parser {
 public:
  explicit Parser(Kernel& kernel) : kernel_(kernel) {
    for (Slot slot = 0; slot < kSpecials; ++slot) new_slot(kSpecialNames[slot], 1, true);
  }

  // `name(.param ..., ...) directives { statements }`
  void parse() {
    const std::string_view text = kernel_.text;
    const size_t open = text.find('('), body = text.find('{');
    if (open < body) {
      for (const std::string_view p :
           split(text.substr(open + 1, text.find(')') - open - 1), ',')) {
        declare(p, kernel_.parameters);
      }
    }
    int depth = 1;
    for (size_t at = body + 1; depth > 0 && at < text.size();) {
      const char c = text[at];
      if (c == '/') {  // a comment
        at = std::min(text.find('\n', at), text.size());
      } else if (c == '{' || c == '}' || std::isspace(static_cast<unsigned char>(c))) {
        depth += (c == '{') - (c == '}');
        ++at;
      } else {
        const size_t stop =
            std::min(text.find_first_of(c == '$' ? ":;" : ";", at), text.size() - 1);
        add_statement(text.substr(at, stop - at), text[stop] == ':');
        at = stop + 1;
      }
    }
    kernel_.code.emplace_back().work = end;  // for a label at the very end
    for (const auto& [index, label] : jumps_) {
      const auto target = labels_.find(label);
      if (target == labels_.end()) fail(kernel_.code[index].text);
      kernel_.code[index].immediate = static_cast<int64_t>(target->second);
    }
  }

 private:
  [[noreturn]] static void fail(std::string_view text) {
    throw Fault("not implemented: " + std::string(text));
  }

  Slot new_slot(const std::string& name, Word value, bool written) {
    kernel_.slots.push_back(value);
    kernel_.written.push_back(written);
    kernel_.names.push_back(name);
    return symbols_[name] = static_cast<Slot>(kernel_.slots.size() - 1);
  }

  // `.param .align 8 .b8 name[2112]` or `.param .u64 name`
  void declare(std::string_view text, std::vector<Region>& regions) {
    const std::vector<std::string_view> words = split(text, ' ');
    std::string_view name = words.back();
    const std::string type(words[words.size() - 2]);
    size_t bytes = std::strtoul(type.c_str() + 2, nullptr, 10) / 8;
    if (const size_t bracket = name.find('['); bracket != name.npos) {
      bytes *= std::strtoul(std::string(name.substr(bracket + 1)).c_str(), nullptr, 10);
      name = name.substr(0, bracket);
    }
    regions.push_back({new_slot(std::string(name), 0, true), bytes});
  }

  // `.reg .b32 %r<12>` (those from %r0 to %r11) or `.reg .b32 %temp`
  void declare_registers(std::string_view text) {
    const std::vector<std::string_view> words = split(text, ' ');
    if (words.size() != 3) fail(text);
    const std::string name(words[2]);
    const size_t bracket = name.find('<');
    if (name.front() != '%' || name.find(',') != name.npos) fail(text);
    if (bracket == name.npos) {
      new_slot(name, 0, false);  // a new one in each `{ }` that declares it
    } else {
      registers_[name.substr(0, bracket)] = std::strtoul(name.c_str() + bracket + 1, nullptr, 10);
    }
  }
  bool is_declared(const std::string& name) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    const auto found = registers_.find(name.substr(0, digits));
    return found != registers_.end() && digits < name.size() &&
           std::strtoul(name.c_str() + digits, nullptr, 10) < found->second;
  }

  void add_statement(std::string_view text, bool is_label) {
    if (is_label) {
      labels_[std::string(text)] = kernel_.code.size();
    } else if (text.substr(0, 6) == ".local") {
      declare(text, kernel_.locals);
    } else if (text.substr(0, 4) == ".reg") {
      declare_registers(text);
    } else if (text.front() != '.') {
      add_instruction(text);
    } else if (text.substr(0, 7) != ".pragma") {
      fail(text);
    }
  }

  // A register, or what stands for a number: `0f3F800000`, `0d...`, `-1`, `0xFF`.
  Slot slot_of(std::string_view view) {
    const std::string text(view);
    const auto symbol = symbols_.find(text);
    if (symbol != symbols_.end()) return symbol->second;
    if (is_declared(text)) return new_slot(text, 0, false);
    const bool real = text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]);
    char* rest = nullptr;
    const char* const digits = text.c_str() + (real ? 2 : 0);
    const Word value = text.front() == '-' ? static_cast<Word>(std::strtoll(digits, &rest, 0))
                                           : std::strtoull(digits, &rest, real ? 16 : 0);
    if (rest == digits || (*rest != '\0' && std::string(rest) != "U")) fail(view);
    return new_slot(text, value, true);
  }

  // `%r1`, `{%r1, %r2}`, `%r1|%p1`, `[%rd1+8]`
  std::vector<Slot> slots_of(std::string_view text, Instruction& i) {
    if (text.front() == '[') {
      text = trimmed(text.substr(1, text.size() - 2));
      const size_t sign = text.find_first_of("+-");
      if (sign != text.npos) {
        const std::string offset(text.substr(sign + (text[sign] == '+')));
        i.immediate = std::strtoll(offset.c_str(), nullptr, 0);
      }
      return {slot_of(trimmed(text.substr(0, sign)))};
    }
    const bool braces = text.front() == '{';
    if (braces) text = text.substr(1, text.size() - 2);
    std::vector<Slot> slots;
    for (const std::string_view part : split(text, braces ? ',' : '|'))
      slots.push_back(slot_of(part));
    return slots;
  }

  void add_instruction(std::string_view text) {
    Instruction i;
    i.text = text;
    std::string_view rest = text;
    if (rest.front() == '@') {
      const size_t blank = rest.find_first_of(" \t");
      i.runs_where = rest[1] != '!';
      const size_t first = i.runs_where ? 1 : 2;
      i.guard = slot_of(rest.substr(first, blank - first));
      rest = trimmed(rest.substr(blank));
    }
    const size_t blank = std::min(rest.find_first_of(" \t"), rest.size());
    std::vector<std::string_view> parts = split(rest.substr(0, blank), '.');
    const std::string_view head = parts.front();
    const std::vector<std::string_view> operands = split(rest.substr(blank), ',');
    if (head == "bra") {
      jumps_.emplace_back(kernel_.code.size(), operands.at(0));
    } else {
      for (size_t k = 0; k < operands.size(); ++k) {
        const bool target = k == 0 && head != "st" && head != "red";
        const bool vectors =
            head == "mov" || head == "ld" || head == "st" || head == "atom" || head == "red";
        if (operands[k].front() == '{' && !vectors) fail(text);
        if (operands[k].find('|') != text.npos && head != "shfl") fail(text);
        for (const Slot slot : slots_of(operands[k], i)) {
          const size_t at = static_cast<size_t>(target ? i.tos++ : i.froms++);
          if (at >= (target ? i.to.size() : i.from.size())) fail(text);
          (target ? i.to[at] : i.from[at]) = slot;
        }
      }
    }
    i.work = table().find(name_of(parts, i));
    if (i.work == nullptr) fail(text);
    if (head == "ld" || head == "st" || head == "atom" || head == "red" || head == "shfl") {
      i.unwritten = Unwritten::kIsAnError;
    }
    // A copy of a struct takes along what lies between its members.
    if (rest.substr(0, 8) == "st.local") i.unwritten = Unwritten::kIsAnErrorInAddress;
    if (head == "selp") i.unwritten = Unwritten::kSelect;
    if (parts.back() == "pred" && head == "and") i.unwritten = Unwritten::kAnd;
    if (parts.back() == "pred" && head == "or") i.unwritten = Unwritten::kOr;
    kernel_.shuffles = kernel_.shuffles || head == "shfl";
    kernel_.code.push_back(i);
  }

  // As it stands in the table; a mode goes into the instruction. What has the name of something
  // else there if a part is left out, gets none.
  static std::string name_of(const std::vector<std::string_view>& parts, Instruction& i) {
    const std::string_view head = parts.front();
    static const std::unordered_map<std::string_view, int64_t> kConversions = {
        {"rni", kNearest}, {"rzi", kTowardZero}, {"rmi", kDown}, {"rpi", kUp}, {"sat", kSaturate}};
    static const std::unordered_map<std::string_view, int64_t> kShuffles = {
        {"down", kShuffleDown}, {"up", kShuffleUp}, {"bfly", kShuffleXor}, {"idx", kShuffleTo}};
    static const std::unordered_map<std::string_view, std::string_view> kUnsigned = {
        {"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}};
    const std::vector<std::string_view> kNothing = {"uni", "global", "nc",   "to", "rn",
                                                    "lo",  "approx", "full", "v2", "v4"};
    std::string name(head);
    if (head == "mov" && i.tos + i.froms > 2) {
      if (parts.back() != "b32" && parts.back() != "b64") return "";
      const int bits = parts.back() == "b64" ? 64 : 32;
      return "mov.parts." + std::to_string(bits / std::max(i.tos, i.froms));
    }
    const bool saturates = std::find(parts.begin(), parts.end(), "sat") != parts.end();
    const bool real = parts.size() == 4 && parts[2] == parts[3] && parts[2].front() == 'f';
    if (head == "cvt" && saturates && !(real && parts[1] == "sat")) return "";
    for (size_t k = 1; k < parts.size(); ++k) {
      const std::string_view part = parts[k];
      if (const auto mode = kConversions.find(part); head == "cvt" && mode != kConversions.end()) {
        i.immediate = mode->second;
      } else if (const auto to = kShuffles.find(part); head == "shfl" && to != kShuffles.end()) {
        i.immediate = to->second;
      } else if (const auto test = kUnsigned.find(part);
                 head == "setp" && test != kUnsigned.end()) {
        name += "." + std::string(test->second);
      } else if (std::find(kNothing.begin(), kNothing.end(), part) != kNothing.end()) {
        continue;
      } else if (part.front() == 'b' && part.size() > 1 && std::isdigit(part[1])) {
        name += ".u" + std::string(part.substr(1));
      } else {
        name += "." + std::string(part);
      }
    }
    return name;
  }

  Kernel& kernel_;
  std::unordered_map<std::string, Slot> symbols_;
  std::unordered_map<std::string, size_t> registers_;  // declared: how many, by their prefix
  std::unordered_map<std::string, size_t> labels_;
  std::vector<std::pair<size_t, std::string>> jumps_;
};

// Its kernels by their mangled names. The fat binary outlives this.
using Module = std::unordered_map<std::string_view, Kernel>;

std::unique_ptr<Module> read_module(std::string_view binary) {
  auto module = std::make_unique<Module>();
  const size_t start = binary.find(".version");
  if (start == binary.npos) return module;  // nothing for the device, or compressed
  const std::string_view text = binary.substr(start, binary.find('\0', start) - start);
  constexpr std::string_view kEntry = ".entry ";
  for (size_t at = text.find(kEntry); at != text.npos;) {
    const size_t next = text.find(kEntry, at + 1);
    const std::string_view kernel = text.substr(at + kEntry.size(), next - at - kEntry.size());
    (*module)[kernel.substr(0, kernel.find_first_of(" \t\n("))].text = kernel;
    at = next;
  }
  return module;
}

// ------------------------------------------------------------------------------- launches

struct Mode {
  bool races = false, backwards = false;
};
Mode mode_of_environment() {
  const char* const value = std::getenv("JAXWARP_PTX_MODE");
  std::string words = value == nullptr ? "" : value;
  std::replace(words.begin(), words.end(), ',', ' ');
  Mode mode;
  for (const std::string_view word : split(words, ' ')) {
    if (word == "races") {
      mode.races = true;
    } else if (word == "backwards") {
      mode.backwards = true;
    } else {
      throw Fault("JAXWARP_PTX_MODE has `" + std::string(word) +
                  "`, but may have: races backwards");
    }
  }
  return mode;
}

// The memory of a warp's lanes, or of one where no lane waits for another.
struct Lanes {
  explicit Lanes(const Kernel& kernel, const std::vector<Word>& start)
      : count(kernel.shuffles ? kWarp : 1), size(start.size()), written(size * count) {
    for (unsigned lane = 0; lane < count; ++lane)
      slots.insert(slots.end(), start.begin(), start.end());
    for (const Region& r : kernel.locals) local_bytes += aligned(r.bytes);
    locals.resize(local_bytes * count);
  }
  static size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

  size_t count, size, local_bytes = 0;
  std::vector<Word> slots;
  std::vector<uint8_t> written, locals;
};

Thread new_thread(const Kernel& kernel, Lanes& lanes, unsigned lane, Races* races,
                  const std::array<unsigned, size_t{kLane} - kTid>& place, uint32_t number) {
  const size_t own = lane % lanes.count;
  Word* const slots = lanes.slots.data() + own * lanes.size;
  uint8_t* const written = lanes.written.data() + own * lanes.size;
  uint8_t* local = lanes.locals.data() + own * lanes.local_bytes;
  std::copy(kernel.written.begin(), kernel.written.end(), written);
  for (const Region& r : kernel.locals) {
    slots[r.address] = reinterpret_cast<Word>(local);
    std::memset(local, 0xff, r.bytes);  // NaN, where it is read before it is written
    local += Lanes::aligned(r.bytes);
  }
  std::copy(place.begin(), place.end(), slots + kTid);
  slots[kLane] = lane;
  return Thread{kernel, slots, written, races, number};
}

void launch(const Kernel& kernel, dim3 grid, dim3 block, void** arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw Fault("an invalid grid");
  }
  if (block.y != 1 || block.z != 1 || grid.z != 1 || block.x == 0 || block.x > 1024) {
    throw Fault("not implemented: such a grid or block");
  }
  std::vector<Word> start = kernel.slots;
  std::vector<std::unique_ptr<uint8_t[]>> copies;  // new aligns them to 16 bytes
  for (size_t k = 0; k < kernel.parameters.size(); ++k) {
    const Region& p = kernel.parameters[k];
    copies.emplace_back(new uint8_t[p.bytes]);
    std::memcpy(copies.back().get(), arguments[k], p.bytes);
    start[p.address] = reinterpret_cast<Word>(copies.back().get());
  }
  const Mode mode = mode_of_environment();
  Races races;
  Races* const asked = mode.races ? &races : nullptr;
  const auto nth = [mode](unsigned i, unsigned count) {
    return mode.backwards ? count - 1 - i : i;
  };
  Lanes lanes(kernel, start);
  const unsigned warps = (block.x + kWarp - 1) / kWarp;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      for (unsigned w = 0; w < warps; ++w) {
        const unsigned bx = nth(x, grid.x), by = nth(y, grid.y), first = nth(w, warps) * kWarp;
        const unsigned count = std::min<unsigned>(kWarp, block.x - first);
        const auto thread = [&](unsigned lane) {
          const unsigned tid = first + lane;
          return new_thread(kernel, lanes, lane, asked,
                            {tid, 0, 0, block.x, 1, 1, bx, by, 0, grid.x, grid.y, 1},
                            (by * grid.x + bx) * block.x + tid + 1);
        };
        if (!kernel.shuffles) {
          for (unsigned k = 0; k < count; ++k) {
            Thread t = thread(nth(k, count));
            t.run();
          }
          continue;
        }
        std::vector<Thread> warp;
        for (unsigned lane = 0; lane < count; ++lane) warp.push_back(thread(lane));
        for (;;) {
          for (unsigned k = 0; k < count; ++k) warp[nth(k, count)].run();
          if (std::none_of(warp.begin(), warp.end(), waits)) break;
          meet(warp);
        }
      }
    }
  }
}

struct Library {
  std::mutex mutex;
  std::vector<std::unique_ptr<Module>> modules;
  std::unordered_map<const void*, Kernel*> kernels;  // by the host's stub
};
Library& library() {
  static Library instance;
  return instance;
}

// As on a GPU, the first error stays until it is asked for.
thread_local std::string first_error, shown_error;

cudaError_t try_launch(const void* stub, dim3 grid, dim3 block, void** arguments) {
  Kernel* kernel = nullptr;
  {
    const std::lock_guard lock(library().mutex);
    const auto found = library().kernels.find(stub);
    if (found != library().kernels.end()) kernel = found->second;
  }
  try {
    if (kernel == nullptr) throw Fault("the object holds no PTX that is not compressed");
    std::call_once(kernel->parsed, [&] {
      try {
        Parser(*kernel).parse();
      } catch (const Fault& fault) {
        kernel->error = fault.what();
      }
    });
    if (!kernel->error.empty()) throw Fault(kernel->error);
    launch(*kernel, grid, block, arguments);
    return cudaSuccess;
  } catch (const Fault& fault) {
    if (first_error.empty()) {
      first_error = std::string("PTX: ") + fault.what();
      if (kernel != nullptr) first_error += ", in " + kernel->name();
    }
    return cudaErrorLaunchFailure;
  }
}

}  // namespace

// ------------------------------------------------------------------------------- CUDA's functions

// Those that nvcc's host code and src/warp_cuda.cu call.
extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
    void* unused;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
  };
  const char* const data = static_cast<Wrapper*>(wrapper)->data;
  Header header;
  std::memcpy(&header, data, sizeof(header));
  const std::lock_guard lock(library().mutex);
  library().modules.push_back(read_module({data, header.header_bytes + header.bytes}));
  return reinterpret_cast<void**>(library().modules.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Module& module = *reinterpret_cast<Module*>(handle);
  const std::lock_guard lock(library().mutex);
  const auto found = module.find(name);
  if (found != module.end()) library().kernels[stub] = &found->second;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                void** arguments) {
  return try_launch(stub, config->gridDim, config->blockDim, arguments);
}
// `kernel<<<grid, block>>>(...)`, by CUDA 12 and by CUDA 13.
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  return try_launch(stub, grid, block, arguments);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t,
                               cudaStream_t) {
  return try_launch(kernel, grid, block, arguments);
}
static thread_local std::optional<std::pair<dim3, dim3>> configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t, cudaStream_t) {
  configuration.emplace(grid, block);
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  std::tie(*grid, *block) = *configuration;
  *shared = 0;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  if (first_error.empty()) return cudaSuccess;
  shown_error = std::exchange(first_error, "");
  return cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : shown_error.c_str();
}

}  // extern "C"
