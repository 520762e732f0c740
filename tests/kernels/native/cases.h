// Cases written by Python, memory that ends where its data ends, and what failed.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace native {

// Places the last element right before a page that must not be touched. With AddressSanitizer the heap does, and tells more.
template <class T>
struct EndGuarded {
  using value_type = T;
  EndGuarded() = default;
  template <class U>
  EndGuarded(const EndGuarded<U>&) {}
  bool operator==(const EndGuarded&) const { return true; }
#if defined(__SANITIZE_ADDRESS__)
  T* allocate(size_t n) { return std::allocator<T>().allocate(n); }
  void deallocate(T* p, size_t n) { std::allocator<T>().deallocate(p, n); }
#else
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t whole_pages(size_t n) { return (n * sizeof(T) + page() - 1) / page() * page(); }
  T* allocate(size_t n) {
    const size_t size = whole_pages(n);
    void* map = mmap(nullptr, size + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    uint8_t* end = static_cast<uint8_t*>(map) + size;
    if (mprotect(end, page(), PROT_NONE) != 0) throw std::bad_alloc();
    return reinterpret_cast<T*>(end - n * sizeof(T));
  }
  void deallocate(T* p, size_t n) {
    uint8_t* end = reinterpret_cast<uint8_t*>(p) + n * sizeof(T);
    munmap(end - whole_pages(n), whole_pages(n) + page());
  }
#endif
};

template <class T>
using Exact = std::vector<T, EndGuarded<T>>;

// A named set of arrays. Its kind is the name's first word. Numbers are arrays of one float64.
class Case {
 public:
  std::string name;
  std::map<std::string, std::vector<uint8_t>> items;

  std::string kind() const { return name.substr(0, name.find(' ')); }
  const std::vector<uint8_t>& bytes(const std::string& key) const;
  double real(const std::string& key) const;
  int64_t number(const std::string& key) const { return static_cast<int64_t>(real(key)); }
  template <class T>
  Exact<T> array(const std::string& key) const {
    const auto& raw = bytes(key);
    if (raw.size() % sizeof(T)) throw std::runtime_error(name + ": " + key + " is of another type");
    Exact<T> out(raw.size() / sizeof(T));
    if (!raw.empty()) std::memcpy(out.data(), raw.data(), raw.size());
    return out;
  }
};

std::vector<Case> read_cases(const std::string& path);

// What one run has checked; `worst` is the largest error seen, as a share of what was allowed, per kind of case.
class Report {
 public:
  int64_t checks = 0, failures = 0;
  std::map<std::string, double> worst;

  void begin(const Case& c) {
    current_ = &c;
    shown_ = 0;
  }
  void check(bool good, const std::string& what);
  // |got - expected| <= allowed, element by element; a NaN must be where one is expected.
  void close(const Exact<float>& got, const Exact<double>& expected, const Exact<double>& allowed, const std::string& what);
  void same_bits(const Exact<float>& got, const Exact<float>& expected, const std::string& what);

 private:
  const Case* current_ = nullptr;
  int64_t shown_ = 0;  // failures printed of this case
};

void linear_case(const Case& c, const ts::Kernels& kernels, Report& report);
void row_case(const Case& c, const ts::Kernels& kernels, Report& report);
void attention_case(const Case& c, const ts::Kernels& kernels, Report& report);
void walk_case(const Case& c, const ts::Kernels& kernels, Report& report);
void block_case(const Case& c, const ts::Kernels& kernels, Report& report);
void experts_case(const Case& c, const ts::Kernels& kernels, Report& report);
void draw_case(const Case& c, const ts::Kernels& kernels, Report& report);
void gumbel_case(const Case& c, const ts::Kernels& kernels, Report& report);
void pool_cases(Report& report);

}  // namespace native
